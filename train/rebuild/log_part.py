"""The part of the log that a version has learned from.

Files come in log order, but a file's events as they lie in it: a rebuild sorts by user anyway. Each
file is decoded once, and of it only the row groups of the buckets that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import FIRST_SEGMENT, LogOffsets, as_buckets
from cache_actors.event_log.segments import SegmentFile, SegmentRows
from marm.addressing import NUM_BUCKETS
from marm.events import EventBatch
from train.screening import EventScreen


def events_before(log: EventLog, end: LogOffsets, buckets: ArrayLike) -> Iterator[EventBatch]:
    """The events of ``buckets`` that a reader had handed out when it stood at ``end``, one file
    (at most a segment file's events) at a time; none of users who were forgotten since."""
    screen = EventScreen(max_ahead_s=None)  # whether training skipped them is not known here
    for file, wanted in _files_before(log, end, buckets):
        rows = log.rows(file, np.where(wanted > 0, 0, file.bucket_rows))
        if rows is not None:
            yield screen.pass_on(_first_of_each(rows, wanted).readable())


def num_rows_before(log: EventLog, end: LogOffsets, buckets: ArrayLike) -> int:
    """Rows of ``buckets`` before ``end``, erased ones included, without decoding them."""
    return sum(int(wanted.sum()) for _, wanted in _files_before(log, end, buckets))


def _files_before(
    log: EventLog, end: LogOffsets, buckets: ArrayLike
) -> Iterator[tuple[SegmentFile, NDArray[np.int64]]]:
    """Sound files in log order, with the number of rows of each bucket that are wanted of them."""
    owned = as_buckets(buckets)
    last = int(end.positions[owned, 0].max(initial=0))
    number = log.next_segment(FIRST_SEGMENT)
    while number is not None and number <= last:
        for path in log.files_of(number):
            file = log.footer(path)
            if file is None:
                continue
            wanted = np.zeros(NUM_BUCKETS, np.int64)
            wanted[owned] = rows_before(file, number, end)[owned]
            if wanted.any():
                yield file, wanted
        number = log.next_segment(number + 1)


def rows_before(file: SegmentFile, number: int, end: LogOffsets) -> NDArray[np.int64]:
    """Rows of each bucket of a file of segment ``number`` that come before ``end``."""
    segment, rows = end.positions[:, 0], end.positions[:, 1]
    partly = np.clip(rows - file.first_rows, 0, file.bucket_rows)
    return np.where(segment > number, file.bucket_rows, np.where(segment == number, partly, 0))


def _first_of_each(rows: SegmentRows, wanted: NDArray[np.int64]) -> SegmentRows:
    """The first ``wanted[b]`` rows of each bucket ``b``, erased ones included, in file order."""
    counts = np.bincount(rows.bucket, minlength=NUM_BUCKETS)
    first = np.cumsum(counts) - counts
    keep = np.arange(len(rows.bucket)) - first[rows.bucket] < wanted[rows.bucket]
    return rows if keep.all() else rows.take(keep)
