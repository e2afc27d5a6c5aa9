"""Micro-batches from the log whose history can be fetched once per user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cache_actors.event_log.offsets import LogOffsets
from marm.events import EventBatch

_BEGINNING_OF_TIME = int(np.iinfo(np.int64).min)


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

    Rows are fetched once per user and batch, up to the time of his first event in it; everything
    between his events must therefore be in the batch itself. Events in order give that for nothing.
    An event that arrives late (older than one handed out before) stays the only one of its user in
    its batch, and a repeated report of an event starts the next batch, where the first is stored.

    Lateness is judged from where this batcher started; the newest time of every user since is kept.
    """

    def __init__(self, source: EventSource, batch_size: int) -> None:
        self._source, self._batch_size = source, batch_size
        self._held = EventBatch.empty()
        self._newest_ms: dict[int, int] = {}

    def next(self) -> MicroBatch | None:
        """The next micro-batch; None when nothing more is committed now."""
        if not len(self._held):
            events = self._source.next(self._batch_size)
            if events is None:
                return None
            self._held = events
        cut = self._cut(self._held)
        events, self._held = self._held.take(slice(0, cut)), self._held.take(slice(cut, None))
        return MicroBatch(events, None if len(self._held) else self._source.offsets)

    def _cut(self, events: EventBatch) -> int:
        """How many of ``events`` can be one micro-batch; takes note of their times."""
        latest: dict[int, int] = {}
        keys: set[tuple[int, int, int]] = set()
        late_users: set[int] = set()
        columns = (events.user_id, events.timestamp_ms, events.event_key)
        for index, (user, stamp, key) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            newest = self._newest_ms.get(user, _BEGINNING_OF_TIME)
            if user not in latest:
                if stamp < newest:
                    late_users.add(user)
            elif user in late_users or stamp < latest[user] or (user, stamp, key) in keys:
                return index
            latest[user] = stamp
            keys.add((user, stamp, key))
            self._newest_ms[user] = max(newest, stamp)
        return len(events)
