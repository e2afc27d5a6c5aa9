"""Reading the event log in order, from any offset, while it grows."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cache_actors.event_log.offsets import LogOffsets, as_buckets
from cache_actors.event_log.segments import SegmentFile, SegmentRows
from marm.addressing import NUM_BUCKETS
from marm.events import EventBatch


class CommittedSegments(Protocol):
    """What a reader needs of a log."""

    def next_segment(self, number: int) -> int | None:
        """The first committed segment numbered ``number`` or more; None when there is none yet."""
        ...

    def files_of(self, number: int) -> list[Path]:
        """Files of a segment, in time order."""
        ...

    def footer(self, path: Path) -> SegmentFile | None:
        """What is in a file; None for a damaged one, which is reported."""
        ...

    def rows(self, file: SegmentFile, skip_rows: NDArray[np.int64]) -> SegmentRows | None:
        """Rows of a file; None for a damaged one, which is reported."""
        ...


class LogReader:
    """Hands out the events of some buckets: segments in order, in time order inside a segment.

    One file is decoded at a time, once, and batches are slices of it. Not for use by several
    threads at once.
    """

    def __init__(self, log: CommittedSegments, offsets: LogOffsets, buckets: ArrayLike) -> None:
        owned = as_buckets(buckets)
        self._log = log
        self._owned = np.zeros(NUM_BUCKETS, np.bool_)
        self._owned[owned] = True
        self._positions = offsets.positions.copy()
        self._next_segment = int(offsets.positions[owned, 0].min()) if len(owned) else None
        self._reading = np.zeros(NUM_BUCKETS, np.bool_)  # buckets that the open segment concerns
        self._segment = 0
        self._files: deque[Path] = deque()
        self._rows = SegmentRows.empty()
        self._consumed = 0  # of self._rows

    @property
    def offsets(self) -> LogOffsets:
        """Where to resume: exactly after the events handed out so far. Erased rows count as rows,
        so an erasure leaves offsets valid."""
        return LogOffsets(self._positions.copy())

    def next(self, max_events: int) -> EventBatch | None:
        """The next events, ``max_events`` or as many as are committed; None when there are none.

        After None, a later call sees what was committed meanwhile.
        """
        if max_events < 1:
            raise ValueError(f"max_events must be at least 1, got {max_events}")
        batches: list[EventBatch] = []
        missing = max_events
        while missing and self._has_events():
            start = self._consumed
            end = min(start + missing, len(self._rows.bucket))
            events = self._rows.take(slice(start, end)).readable()
            self._consume(end)
            if len(events):
                batches.append(events)
                missing -= len(events)
        if not batches:
            return None
        return batches[0] if len(batches) == 1 else EventBatch.concat(batches)

    def _has_events(self) -> bool:
        """Make sure that decoded events are waiting; false at the end of the log."""
        while self._consumed == len(self._rows.bucket):
            if self._files:
                self._decode(self._files.popleft())
            elif not self._open_segment():
                return False
        return True

    def _open_segment(self) -> bool:
        if self._next_segment is None:
            return False
        number = self._log.next_segment(self._next_segment)
        if number is None:
            return False
        self._segment = number
        self._reading = self._owned & (self._positions[:, 0] <= number)
        fresh = self._reading & (self._positions[:, 0] < number)
        self._positions[fresh] = (number, 0)
        self._files.extend(self._log.files_of(number))
        self._next_segment = number + 1
        if not self._files:  # a directory without parts
            self._close_segment()
        return True

    def _decode(self, path: Path) -> None:
        """Decode the part of a file that is ours and not yet consumed, into time order."""
        self._rows, self._consumed = SegmentRows.empty(), 0
        file = self._log.footer(path)
        if file is not None:
            consumed = np.clip(self._positions[:, 1] - file.first_rows, 0, file.bucket_rows)
            skip_rows = np.where(self._reading, consumed, file.bucket_rows)
            rows = self._log.rows(file, skip_rows)
            if rows is not None:
                # Rows of earlier parts that were damaged count as consumed from here on.
                reached = np.maximum(self._positions[:, 1], file.first_rows)
                self._positions[self._reading, 1] = reached[self._reading]
                order = np.lexsort((rows.events.event_key, rows.events.timestamp_ms))
                self._rows = rows.take(order)
        if not len(self._rows.bucket) and not self._files:
            self._close_segment()

    def _consume(self, end: int) -> None:
        buckets = self._rows.bucket[self._consumed : end]
        self._positions[:, 1] += np.bincount(buckets, minlength=NUM_BUCKETS)
        self._consumed = end
        if end == len(self._rows.bucket) and not self._files:
            self._close_segment()

    def _close_segment(self) -> None:
        self._positions[self._reading] = (self._segment + 1, 0)
