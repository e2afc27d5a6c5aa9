"""Events that can't be right: what is skipped, what is kept, and how many there were.

Ingesting refuses most of them by name, but a log is also written by feedback and by other programs.
The rules depend on an event alone, and on the time of day only for events that claim to come from
the future.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from marm.events import TASKS, WATCH_TIME, EventBatch

MAX_WATCH_S = 1e9
"""A watch of 30 years; what is longer is an error of units."""

FUTURE = "skipped_from_the_future"
BEFORE_1970 = "skipped_before_1970"
LABELS = "labels_made_unknown"
LATE = "kept_late"
TALLIES = (FUTURE, BEFORE_1970, LABELS, LATE)
"""What is counted: events skipped, labels (not events) made unknown, and events kept although they
are much older than the newest one."""

_MS = 1000


def wall_clock_ms() -> int:
    """Now, in Unix milliseconds."""
    return time.time_ns() // 1_000_000


@dataclass
class EventScreen:
    """Passes events on, less the impossible ones.

    Attributes:
        max_ahead_s: an event further ahead of the clock than this is skipped: nothing that is real
            happens later than now, and its row would be its user's newest for as long. None keeps
            all, for simulated worlds whose time runs ahead.
        late_after_s: an event further behind the newest one than this counts as late. It is kept:
            it sees the rows from before it, whenever it arrives.
        clock_ms: what tells the time.
    """

    max_ahead_s: float | None = 86_400.0
    late_after_s: float = 86_400.0
    clock_ms: Callable[[], int] = wall_clock_ms
    newest_ms: int = 0
    tallies: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TALLIES, 0))

    def pass_on(self, events: EventBatch) -> EventBatch:
        """The events to learn, in their order; impossible labels become unknown (NaN)."""
        stamps = events.timestamp_ms
        is_future = np.zeros(len(events), np.bool_)
        if self.max_ahead_s is not None:
            is_future = stamps > self.clock_ms() + int(self.max_ahead_s * _MS)
        is_negative = stamps < 0
        self._count(FUTURE, is_future)
        self._count(BEFORE_1970, is_negative)
        if is_future.any() or is_negative.any():
            events = events.take(~is_future & ~is_negative)
        self._count_late(events.timestamp_ms)
        return self._with_possible_labels(events)

    def _count_late(self, stamps: NDArray[np.int64]) -> None:
        newest_before = np.maximum.accumulate(np.append(self.newest_ms, stamps))
        self._count(LATE, stamps < newest_before[:-1] - int(self.late_after_s * _MS))
        self.newest_ms = int(newest_before[-1])

    def _with_possible_labels(self, events: EventBatch) -> EventBatch:
        impossible = impossible_labels(events.labels)
        if not impossible.any():
            return events
        self._count(LABELS, impossible)
        return replace(events, labels=np.where(impossible, np.float32(np.nan), events.labels))

    def _count(self, name: str, which: NDArray[np.bool_]) -> None:
        self.tallies[name] += int(np.count_nonzero(which))


def impossible_labels(labels_BT: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Observed labels that can't be: binary ones outside [0, 1], watch times that are negative,
    infinite or longer than `MAX_WATCH_S`. NaN, not observed, is possible."""
    upper = np.ones(labels_BT.shape[1], np.float32)
    upper[TASKS.index(WATCH_TIME)] = MAX_WATCH_S
    impossible: NDArray[np.bool_] = (labels_BT < 0) | (labels_BT > upper)  # NaN is neither
    return impossible
