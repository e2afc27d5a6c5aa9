"""Micro-batches from the log: as many events as allowed, never out of time order within a user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cache_actors.event_log.offsets import LogOffsets
from marm.events import EventBatch


class EventSource(Protocol):
    """What hands out events: a log reader, or anything that continues like one."""

    @property
    def offsets(self) -> LogOffsets:
        """Where to resume after the events handed out so far."""
        ...

    def next(self, max_events: int) -> EventBatch | None:
        """The next events, at most ``max_events``; None when nothing more is committed now."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """Events to learn from together.

    ``resume`` are the log offsets after them, or None inside a read that had to be split: a
    checkpoint then has to wait for the next batch.
    """

    events: EventBatch
    resume: LogOffsets | None


class Batcher:
    """Cuts a source into micro-batches of at most ``batch_size`` events.

    Rows are fetched once per user and batch, up to the time of his first event in it. An event that
    is older than an earlier one of its user (it arrived late) needs other rows, so it starts the
    next batch.
    """

    def __init__(self, source: EventSource, batch_size: int) -> None:
        self._source, self._batch_size = source, batch_size
        self._held = EventBatch.empty()

    def next(self) -> MicroBatch | None:
        """The next micro-batch; None when nothing more is committed now."""
        if not len(self._held):
            events = self._source.next(self._batch_size)
            if events is None:
                return None
            self._held = events
        cut = first_late_event(self._held)
        events, self._held = self._held.take(slice(0, cut)), self._held.take(slice(cut, None))
        return MicroBatch(events, None if len(self._held) else self._source.offsets)


def first_late_event(events: EventBatch) -> int:
    """Index of the first event older than an earlier one of its user; ``len(events)`` if none."""
    order = np.argsort(events.user_id, kind="stable")
    # Up to the first late event a user's times do not decrease, so neighbours tell.
    same_user = np.diff(events.user_id[order]) == 0
    is_late = same_user & (np.diff(events.timestamp_ms[order]) < 0)
    return int(order[1:][is_late].min(initial=len(events)))
