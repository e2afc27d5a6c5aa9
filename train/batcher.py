"""Micro-batches from the log whose history can be fetched once per user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cache_actors.event_log.offsets import LogOffsets
from marm.addressing import mix64
from marm.events import EventBatch
from train.screening import TALLIES, EventScreen

NUM_CLOCKS = 1 << 16
"""Users share so many notes of the newest time; a multiple of the number of user buckets, so that
workers, who own buckets, never share one."""

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
class FeedState:
    """What a batcher remembers of the events it handed out: part of a checkpoint, as the cuts that
    come depend on it."""

    clocks_ms: NDArray[np.int64]  # [NUM_CLOCKS] newest time of the users of each clock
    newest_ms: int
    tallies: dict[str, int]  # see `train.screening`

    @staticmethod
    def start() -> FeedState:
        """Of a batcher that handed out nothing."""
        clocks_ms = np.full(NUM_CLOCKS, _BEGINNING_OF_TIME, np.int64)
        return FeedState(clocks_ms, 0, dict.fromkeys(TALLIES, 0))

    def to_arrays(self) -> dict[str, NDArray]:
        """For a file; `merge` takes them."""
        tallies = np.array([self.tallies[name] for name in TALLIES], np.int64)
        return {
            "clocks_ms": self.clocks_ms,
            "newest_ms": np.array([self.newest_ms], np.int64),
            "tallies": tallies,
        }

    @staticmethod
    def merge(parts: list[dict[str, NDArray]]) -> FeedState:
        """One state that all workers of a later run can continue from, whatever their number.

        Raises:
            ValueError: when a part was written with another number of clocks or tallies.
        """
        state = FeedState.start()
        clocks_ms, newest_ms, tallies = state.clocks_ms, state.newest_ms, np.zeros(len(TALLIES))
        for part in parts:
            if part["clocks_ms"].shape != clocks_ms.shape or len(part["tallies"]) != len(TALLIES):
                raise ValueError(
                    f"expected {NUM_CLOCKS} clocks and {len(TALLIES)} tallies, got "
                    f"{part['clocks_ms'].shape} and {part['tallies'].shape}; was it saved by "
                    "another version?"
                )
            clocks_ms = np.maximum(clocks_ms, part["clocks_ms"])
            newest_ms = max(newest_ms, int(part["newest_ms"][0]))
            tallies = tallies + part["tallies"]
        counted = dict(zip(TALLIES, tallies.astype(np.int64).tolist(), strict=True))
        return FeedState(clocks_ms, newest_ms, counted)


@dataclass(frozen=True)
class MicroBatch:
    """Events to learn from together.

    ``resume`` are the log offsets after them, and ``state`` the batcher's; both are None inside a
    read that had to be split: a checkpoint then has to wait for the next batch.
    """

    events: EventBatch
    resume: LogOffsets | None
    state: FeedState | None = None


class Batcher:
    """Cuts a source into micro-batches of at most ``batch_size`` events.

    Rows are fetched once per user and batch, up to the time of his first event in it; everything
    between his events must therefore be in the batch itself. Events in order give that for nothing.
    An event that arrives late (older than one handed out before) stays the only one of its user in
    its batch, and a repeated report of an event starts the next batch, where the first is stored.

    The newest time is kept for clocks that users share by hash, so memory does not grow with users.
    A user may then be taken for late because of another one, which makes batches smaller and never
    wrong.
    """

    def __init__(
        self, source: EventSource, batch_size: int, screen: EventScreen | None = None
    ) -> None:
        self._source, self._batch_size = source, batch_size
        self._screen = EventScreen() if screen is None else screen
        self._held = EventBatch.empty()
        self._clocks_ms = FeedState.start().clocks_ms

    def restore(self, state: FeedState) -> None:
        """Continue from a batcher's state; the source must continue at the same place."""
        self._clocks_ms = state.clocks_ms.copy()
        self._screen.newest_ms = state.newest_ms
        self._screen.tallies = dict(state.tallies)

    def state(self) -> FeedState:
        """What it remembers after the micro-batches so far."""
        screen = self._screen
        return FeedState(self._clocks_ms.copy(), screen.newest_ms, dict(screen.tallies))

    def next(self) -> MicroBatch | None:
        """The next micro-batch; None when nothing more is committed now."""
        while not len(self._held):
            events = self._source.next(self._batch_size)
            if events is None:
                return None
            self._held = self._screen.pass_on(events)
        cut = self._cut(self._held)
        events, self._held = self._held.take(slice(0, cut)), self._held.take(slice(cut, None))
        if len(self._held):
            return MicroBatch(events, None)
        return MicroBatch(events, self._source.offsets, self.state())

    def _cut(self, events: EventBatch) -> int:
        """How many of ``events`` can be one micro-batch; takes note of their times."""
        clocks = (mix64(events.user_id) % np.uint64(NUM_CLOCKS)).astype(np.int64)
        num_events = _num_together(events, self._clocks_ms[clocks])
        np.maximum.at(self._clocks_ms, clocks[:num_events], events.timestamp_ms[:num_events])
        return num_events


def _num_together(events: EventBatch, newest_before_ms: NDArray[np.int64]) -> int:
    """How many of ``events`` can be one micro-batch, given the newest time handed out before to
    each one's user."""
    latest: dict[int, int] = {}
    keys: set[tuple[int, int, int]] = set()
    late_users: set[int] = set()
    columns = (events.user_id, events.timestamp_ms, events.event_key, newest_before_ms)
    for index, (user, stamp, key, newest) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True)
    ):
        if user not in latest:
            if stamp < newest:
                late_users.add(user)
        elif user in late_users or stamp < latest[user] or (user, stamp, key) in keys:
            return index
        latest[user] = stamp
        keys.add((user, stamp, key))
    return len(events)
