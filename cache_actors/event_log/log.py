"""The event log: an append-only run of segments, written and read by any number of processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cache_actors.atomic_files import remove_abandoned, write_hint
from cache_actors.event_log.forgotten import ForgottenUsers
from cache_actors.event_log.offsets import FIRST_SEGMENT, LogOffsets, as_buckets
from cache_actors.event_log.reader import LogReader
from cache_actors.event_log.schema import check_events
from cache_actors.event_log.segments import (
    MAX_SEGMENT_EVENTS,
    SEGMENT_NAME,
    SegmentError,
    SegmentFile,
    SegmentRows,
    read_footer,
    read_rows,
    segment_files,
    segment_numbers,
    segment_path,
    write_segment,
)
from marm.addressing import NUM_BUCKETS
from marm.events import EventBatch

logger = logging.getLogger(__name__)

LAST_HINT = ".last"
"""Holds the number of a recent segment. Only a hint: it may be stale or absent."""

HIDDEN_PREFIX = "."
"""Names that begin so are ours and no segments: the hint, and unfinished segments."""

ALL_BUCKETS: NDArray[np.int64] = np.arange(NUM_BUCKETS)
"""Every bucket: what a single reader owns."""


class EventLog:
    """The log under ``path`` (a home's ``log`` directory).

    Appends are atomic, durable when they return, and safe from several processes and threads at
    once. Damaged and foreign files are named in `problems` and skipped, never a reason to stop.
    """

    def __init__(self, path: Path, max_segment_events: int = MAX_SEGMENT_EVENTS) -> None:
        if max_segment_events < 1:
            raise ValueError(f"max_segment_events must be at least 1, got {max_segment_events}")
        self._segments = Path(path) / "segments"
        self._forgotten = ForgottenUsers(Path(path))
        self._max_segment_events = max_segment_events
        self._last_known: int | None = None
        self._problems: dict[str, str] = {}
        self._num_events: dict[int, int] = {}  # of whole segments, as they were first seen

    def append(self, events: EventBatch) -> int:
        """Commit ``events``, all or none, and return their segment's number.

        No events make no segment: the number of the last one is returned (0 in an empty log).
        """
        check_events(events)
        if not len(events):
            return self.last_segment()
        self._segments.mkdir(parents=True, exist_ok=True)
        number = write_segment(
            self._segments, events, self.last_segment(), self._max_segment_events
        )
        write_hint(self._segments / LAST_HINT, str(number))
        self._last_known = number
        return number

    def reader(self, offsets: LogOffsets, buckets: ArrayLike = ALL_BUCKETS) -> LogReader:
        """A reader of ``buckets`` that continues after ``offsets``."""
        reached = int(offsets.positions[as_buckets(buckets), 0].max(initial=0))
        if reached > self.last_segment() + 1:
            raise ValueError(
                f"offsets reach segment {reached}, but the log in {self._segments} ends at "
                f"{self.last_segment()}; use the log that they were saved from, or start afresh"
            )
        return LogReader(self, offsets, buckets)

    def read(
        self, offsets: LogOffsets, buckets: ArrayLike = ALL_BUCKETS, max_events: int = 4096
    ) -> Iterator[EventBatch]:
        """Batches of everything committed by now after ``offsets``."""
        reader = self.reader(offsets, buckets)
        while (batch := reader.next(max_events)) is not None:
            yield batch

    def remove_abandoned(self) -> list[str]:
        """Delete what writers that crashed left unfinished; the names removed."""
        return remove_abandoned(self._segments)

    def last_segment(self) -> int:
        """Number of the newest segment; 0 when there is none. Cheap after the first call."""
        if self._last_known is None:
            self._last_known = max(self.segments(), default=FIRST_SEGMENT - 1)
        # Numbers are claimed one after the other, so the next free one is the end of the log. The
        # hint spares a listing where a stretch after the last known one was deleted.
        last = max(self._last_known, self._hinted_last())
        while segment_path(self._segments, last + 1).exists():
            last += 1
        self._last_known = last
        return last

    def segments(self) -> list[int]:
        """Numbers of all committed segments, ascending."""
        if not self._segments.is_dir():
            return []
        names = os.listdir(self._segments)
        for name in sorted(names):
            if not SEGMENT_NAME.fullmatch(name) and not name.startswith(HIDDEN_PREFIX):
                self._report(name, f"{name}: not a segment's name; skipped")
        return segment_numbers(names)

    def end(self) -> LogOffsets:
        """Offsets after everything committed by now."""
        return LogOffsets.at_segment(self.last_segment() + 1)

    def num_events(self, after: LogOffsets | None = None, buckets: ArrayLike = ALL_BUCKETS) -> int:
        """Readable events of ``buckets`` after ``after`` (default: all), without decoding them.

        Events of forgotten users count until they are erased."""
        positions = (after or LogOffsets.start()).positions
        owned = as_buckets(buckets)
        total = 0
        number = self.next_segment(int(positions[owned, 0].min(initial=self.last_segment() + 1)))
        while number is not None:
            is_whole = len(owned) == NUM_BUCKETS and bool((positions[:, 0] < number).all())
            if is_whole and number in self._num_events:
                total += self._num_events[number]
            else:
                left = sum(
                    int(_rows_left(file, number, positions)[owned].sum())
                    for path in self.files_of(number)
                    if (file := self.footer(path)) is not None
                )
                total += left
                if is_whole:
                    self._num_events[number] = left
            number = self.next_segment(number + 1)
        return total

    @property
    def problems(self) -> list[str]:
        """Every damaged, foreign or missing file found so far, with the reason; looks at names
        again, and at contents as far as segments were opened."""
        self.segments()
        return list(self._problems.values())

    def next_segment(self, number: int) -> int | None:
        """The first committed segment numbered ``number`` or more; None when there is none yet."""
        if segment_path(self._segments, number).exists():
            return number
        if number > self.last_segment():
            return None
        found = min((later for later in self.segments() if later >= number), default=None)
        if found is not None and found > number > FIRST_SEGMENT:
            self._report(f"{number:012d}", f"segments {number} to {found - 1} are missing")
        return found

    def files_of(self, number: int) -> list[Path]:
        """Files of a segment, in time order."""
        path = segment_path(self._segments, number)
        files = segment_files(path)
        if not files:
            self._report(path.name, f"{path.name}: a directory without parts; skipped")
        return files

    def footer(self, path: Path) -> SegmentFile | None:
        """What is in a file; None for a damaged one, which is reported."""
        try:
            return read_footer(path)
        except SegmentError as error:
            self._report_damaged(path, error)
            return None

    def rows(self, file: SegmentFile, skip_rows: NDArray[np.int64]) -> SegmentRows | None:
        """Rows of a file; None for a damaged one, which is reported. Events of forgotten users
        count as erased, whether or not they are still in the file."""
        try:
            rows = read_rows(file, skip_rows)
        except SegmentError as error:
            self._report_damaged(file.path, error)
            return None
        return replace(rows, erased=rows.erased | self.forgets(rows.events))

    def forgets(self, events: EventBatch) -> NDArray[np.bool_]:
        """Which events belong to users who were forgotten after them (see `forgotten`)."""
        return self._forgotten.covers(events.user_id, events.timestamp_ms)

    def _hinted_last(self) -> int:
        try:
            return int((self._segments / LAST_HINT).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return FIRST_SEGMENT - 1

    def _report_damaged(self, path: Path, error: SegmentError) -> None:
        name = str(path.relative_to(self._segments))
        self._report(name, f"{name}: {error}; skipped")

    def _report(self, name: str, problem: str) -> None:
        if name not in self._problems:
            self._problems[name] = problem
            logger.warning("event log %s: %s", self._segments, problem)


def _rows_left(file: SegmentFile, number: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of each bucket of a file of segment ``number`` that ``positions`` has not consumed."""
    partly = np.clip(positions[:, 1] - file.first_rows, 0, file.bucket_rows)
    untouched = positions[:, 0] < number
    finished = positions[:, 0] > number
    consumed = np.where(untouched, 0, np.where(finished, file.bucket_rows, partly))
    return file.rows_after(consumed)
