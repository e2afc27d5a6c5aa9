"""Feedback: to the event log first, then as raw rows, so that the next request sees it.

The log is the truth: an event counts as accepted once the log has it. Raw rows are a head start on
training; where a shard is down they are missing until training has computed them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from app.schemas import FeedbackEvent, FeedbackReceipt, FeedbackResponse
from marm.addressing import event_key
from marm.events import TASKS, EventBatch
from marm.items import ItemCatalog
from marm.memory import Ack, Namespace, UserRows
from marm.sequence import enters_sequence, raw_rows

logger = logging.getLogger("ray.serve")

RECENT_ROWS = 200
"""How far back to look for the first report of an event that brings an id but no time stamp."""


class EventSink(Protocol):
    """Where events become durable."""

    async def append(self, events: EventBatch) -> list[bool]:
        """For each event whether it was appended (true) or is a duplicate (false)."""
        ...


class RowStore(Protocol):
    """The rows of one namespace."""

    def fetch_available(
        self, user_ids: NDArray[np.int64], n: int, before_ms: NDArray[np.int64] | None = None
    ) -> tuple[UserRows, NDArray[np.bool_]]:
        """Rows, and which users' shard did not answer."""
        ...

    def save(self, user_ids: NDArray[np.int64], rows: NDArray[np.void]) -> Ack:
        """See `marm.memory.Memory.save`."""
        ...


def client_event_key(user_id: int, event_id: str) -> int:
    """The event key of an event that the client named itself."""
    digest = hashlib.blake2b(f"{user_id}:{event_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


@dataclass(frozen=True)
class Report:
    """Feedback events as columns, and what is known of each beyond them."""

    events: EventBatch
    known_item: NDArray[np.bool_]
    has_time: NDArray[np.bool_]  # the time stamp is the event's own, not that of this report


def parse_report(events: list[FeedbackEvent], catalog: ItemCatalog, now_ms: int) -> Report:
    """Columns of ``events``; events without a time happened now."""
    user_id = np.array([event.user_id for event in events], np.int64)
    item_id = np.array([event.item_id for event in events], np.int64)
    has_time = np.array([event.timestamp_ms is not None for event in events], np.bool_)
    times = [now_ms if event.timestamp_ms is None else event.timestamp_ms for event in events]
    timestamp_ms = np.array(times, np.int64)
    keys = event_key(user_id, item_id, timestamp_ms)
    for index, event in enumerate(events):
        if event.event_id is not None:
            keys[index] = client_event_key(event.user_id, event.event_id)
    labels = np.full((len(events), len(TASKS)), np.nan, np.float32)
    for index, event in enumerate(events):
        for task, value in event.labels.by_task().items():
            labels[index, TASKS.index(task)] = value
    items = catalog.lookup(item_id)
    batch = EventBatch(
        user_id=user_id,
        item_id=item_id,
        timestamp_ms=timestamp_ms,
        event_key=keys,
        author_id=items.author_id,
        tag_id=items.tag_id,
        duration_ms=items.duration_ms,
        context_id=np.array([event.context_id for event in events], np.int32),
        labels=labels,
    )
    return Report(batch, catalog.contains(item_id), has_time)


def with_stored_times(report: Report, stored: UserRows) -> Report:
    """Give events without a time the one they were first stored with, found by event key."""
    events = report.events
    owner = np.repeat(stored.user_ids, stored.counts).tolist()
    keys = zip(owner, stored.rows["event_key"].tolist(), strict=True)
    times = dict(zip(keys, stored.rows["timestamp_ms"].tolist(), strict=True))
    timestamp_ms, has_time = events.timestamp_ms.copy(), report.has_time.copy()
    for index in np.flatnonzero(~report.has_time):
        found = times.get((int(events.user_id[index]), int(events.event_key[index])))
        if found is not None:
            timestamp_ms[index], has_time[index] = found, True
    return replace(report, events=replace(events, timestamp_ms=timestamp_ms), has_time=has_time)


def rows_of_namespace(
    events: EventBatch, namespace: Namespace
) -> tuple[NDArray[np.int64], NDArray[np.void]]:
    """The raw rows of the events that enter the namespace's sequence, and whose they are."""
    entering = events.take(enters_sequence(events, namespace.sequence))
    return entering.user_id, raw_rows(entering, namespace.row_dtype)


class FeedbackService:
    """Takes feedback in. Repeating a call is safe and changes nothing."""

    def __init__(
        self,
        log: EventSink,
        catalog: Callable[[], ItemCatalog],
        stores: Callable[[], Awaitable[Mapping[Namespace, RowStore]]],
        timeout_s: float,
    ) -> None:
        """``stores`` gives the rows of every namespace that a live model reads."""
        self._log = log
        self._catalog = catalog
        self._stores = stores
        self._timeout_s = timeout_s

    async def accept(self, events: list[FeedbackEvent], now_ms: int) -> FeedbackResponse:
        """Make ``events`` durable and visible to the next request."""
        stores = await self._stores()
        report = parse_report(events, self._catalog(), now_ms)
        named = np.array([event.event_id is not None for event in events], np.bool_)
        if (named & ~report.has_time).any():
            users = np.unique(report.events.user_id[named & ~report.has_time])
            for store in stores.values():
                stored, _ = await asyncio.to_thread(store.fetch_available, users, RECENT_ROWS)
                report = with_stored_times(report, stored)
        appended = np.array(
            await asyncio.wait_for(self._log.append(report.events), self._timeout_s), np.bool_
        )
        # Of a repeated event without a time of its own nothing says where its row belongs, and
        # its first report has already put it there.
        saved = report.events.take(appended | report.has_time)
        degraded = await self._save(saved, stores.items())
        return FeedbackResponse(
            accepted=int(appended.sum()),
            duplicates=int((~appended).sum()),
            events=[
                FeedbackReceipt(
                    status="accepted" if appended[index] else "duplicate",
                    event_key=f"{int(report.events.event_key[index]):016x}",
                    timestamp_ms=int(report.events.timestamp_ms[index]),
                    known_item=bool(report.known_item[index]),
                )
                for index in range(len(events))
            ],
            degraded=degraded,
        )

    async def _save(
        self, events: EventBatch, stores: Iterable[tuple[Namespace, RowStore]]
    ) -> list[str]:
        return [
            problem
            for namespace, store in stores
            if (problem := await asyncio.to_thread(self._save_rows, namespace, store, events))
        ]

    def _save_rows(self, namespace: Namespace, store: RowStore, events: EventBatch) -> str:
        """Empty when the rows are stored; else what is wrong."""
        user_ids, rows = rows_of_namespace(events, namespace)
        if not len(rows):
            return ""
        try:
            store.save(user_ids, rows).wait(self._timeout_s)
        except Exception as error:
            # The events are in the log, so nothing is lost and the caller need not repeat.
            logger.warning("raw rows of %s were not stored: %s", namespace.name, error)
            return f"memory {namespace.name} did not take the rows yet; training will add them"
        return ""
