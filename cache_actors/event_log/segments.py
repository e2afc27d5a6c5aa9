"""Segments of the event log: Parquet files of events, grouped by user bucket, in time order.

A segment is what one append committed. It is one file, or, when the append was larger than a file
may be, one directory of such files (parts) in time order; either gets its number in a single atomic
step. Rows of a file are sorted by (bucket, timestamp_ms, event_key) and its metadata says how many
rows each bucket has, so a reader of some buckets can skip the rest of the file.

A file is written once. Only an erasure (`cache_actors.event_log.erase`) replaces it, by one with as
many rows in the same places, so that offsets stay valid; rows of no bucket are the erased ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cache_actors.atomic_files import (
    claim_directory,
    claim_file,
    pending_path,
    sync_directory,
)
from cache_actors.event_log.schema import EVENT_SCHEMA, events_from_table, events_to_table
from marm.addressing import NUM_BUCKETS, user_bucket
from marm.events import TASKS, EventBatch

MAX_SEGMENT_EVENTS = 250_000
"""Most events of one file; bounds the memory of a reader."""

FORMAT_VERSION = 1
ERASED_FORMAT_VERSION = 2
"""Of files with erased rows, which readers of the first format would take for events."""

ERASED_BUCKET = -1
"""In the ``bucket`` column of an erased row; every other column there is meaningless."""

METADATA_KEY = b"marm.event_log"
SEGMENT_NAME = re.compile(r"(\d{12})\.parquet")
PART_NAME = re.compile(r"\d{6}-of-(\d{6})\.parquet")

_MIN_ROW_GROUP_EVENTS = 16_384  # below this, a row group's own metadata costs more than it saves
_THREADED_READ_EVENTS = 32_768  # smaller reads finish before a thread pool gets going

_REPETITIVE_COLUMNS = ["bucket", "author_id", "tag_id", "duration_ms", "context_id", *TASKS]


class SegmentError(ValueError):
    """A file under a segment's name that can't be read as one; the message says why."""


@dataclass(frozen=True)
class SegmentFile:
    """What the footer of one file says. Bucket ``b`` owns rows ``first_rows[b]`` up to
    ``first_rows[b] + bucket_rows[b]`` of the segment's rows of that bucket."""

    path: Path
    first_rows: NDArray[np.int64]  # [NUM_BUCKETS], rows in earlier parts of the same segment
    bucket_rows: NDArray[np.int64]  # [NUM_BUCKETS]
    row_group_starts: NDArray[np.int64]  # [row groups + 1], in rows of the file
    erased: NDArray[np.int64]  # rows of the file that hold no event any more, ascending

    def rows_after(self, consumed: NDArray[np.int64]) -> NDArray[np.int64]:
        """Events of each bucket that are left when the first ``consumed[b]`` of its rows are
        skipped, ``[NUM_BUCKETS]``."""
        ends = np.cumsum(self.bucket_rows)
        bucket = np.searchsorted(ends, self.erased, side="right")
        row_in_bucket = self.erased - (ends - self.bucket_rows)[bucket]
        left = bucket[row_in_bucket >= consumed[bucket]]
        return self.bucket_rows - consumed - np.bincount(left, minlength=NUM_BUCKETS)


@dataclass(frozen=True)
class SegmentRows:
    """Rows of a file, in file order; what stands at erased ones is no event."""

    events: EventBatch
    bucket: NDArray[np.int64]  # [rows]
    erased: NDArray[np.bool_]  # [rows]

    @staticmethod
    def empty() -> SegmentRows:
        """No rows."""
        return SegmentRows(EventBatch.empty(), np.empty(0, np.int64), np.empty(0, np.bool_))

    def take(self, index: NDArray | slice) -> SegmentRows:
        """The rows at ``index`` (integers, a boolean mask or a slice), in that order."""
        return SegmentRows(self.events.take(index), self.bucket[index], self.erased[index])

    def readable(self) -> EventBatch:
        """The events among the rows."""
        return self.events.take(~self.erased) if self.erased.any() else self.events


def segment_path(directory: Path, number: int) -> Path:
    """Where segment ``number`` lives."""
    return directory / f"{number:012d}.parquet"


def segment_numbers(names: list[str]) -> list[int]:
    """Numbers of the segments among file names, ascending."""
    matches = (SEGMENT_NAME.fullmatch(name) for name in names)
    return sorted(int(match[1]) for match in matches if match)


def write_segment(
    directory: Path, events: EventBatch, after: int, max_events: int = MAX_SEGMENT_EVENTS
) -> int:
    """Commit ``events`` (at least one) under the first free number above ``after``.

    All of them become visible and durable at once, or none does. Any number of processes may call
    this at the same time; every call gets its own number.
    """
    pending = pending_path(directory)
    try:
        if len(events) <= max_events:
            _write_file(pending, events, np.zeros(NUM_BUCKETS, np.int64))
            claim = claim_file
        else:
            _write_parts(pending, events, max_events)
            claim = claim_directory
        number = after + 1
        while not claim(pending, segment_path(directory, number)):
            number += 1
        return number
    finally:
        if pending.is_dir():
            shutil.rmtree(pending)
        else:
            pending.unlink(missing_ok=True)


def segment_files(path: Path) -> list[Path]:
    """The files that the segment at ``path`` was committed with, in time order."""
    if not path.is_dir():
        return [path]
    # Every part's name says how many there are, so one that was deleted is noticed.
    counts = {int(match[1]) for part in path.iterdir() if (match := PART_NAME.fullmatch(part.name))}
    return [path / _part_name(part, count) for count in counts for part in range(count)]


def _part_name(part: int, num_parts: int) -> str:
    return f"{part:06d}-of-{num_parts:06d}.parquet"


def read_footer(path: Path) -> SegmentFile:
    """Read and verify what a file says about itself."""
    with _open_parquet(path) as file:
        return _verified_footer(path, file)


def read_rows(segment: SegmentFile, skip_rows: NDArray[np.int64]) -> SegmentRows:
    """Rows of a file, in file order, without the first ``skip_rows[b]`` rows of each bucket ``b``
    (``bucket_rows[b]`` skips all of it)."""
    bucket_ends = np.cumsum(segment.bucket_rows)
    bucket_starts = bucket_ends - segment.bucket_rows
    wanted = np.flatnonzero(skip_rows < segment.bucket_rows)
    starts, ends = bucket_starts[wanted] + skip_rows[wanted], bucket_ends[wanted]
    groups, position = _row_groups_of(segment, starts, ends)
    if not groups:
        return SegmentRows.empty()
    with _open_parquet(segment.path) as file:
        table = file.read_row_groups(groups, use_threads=len(position) >= _THREADED_READ_EVENTS)
    if table.num_rows != len(position):
        raise SegmentError(f"expected {len(position)} rows, found {table.num_rows}")
    bucket = np.searchsorted(bucket_ends, position, side="right")
    # The rows say themselves which are erased: the file may have been replaced since its footer
    # was read.
    erased = table.column("bucket").to_numpy() == ERASED_BUCKET
    rows = SegmentRows(events_from_table(table), bucket, erased)
    keep = position >= (bucket_starts + skip_rows)[bucket]
    return rows if keep.all() else rows.take(keep)


def write_erased(path: Path, segment: SegmentFile, rows: SegmentRows) -> None:
    """Write to ``path`` what is to replace ``segment``: all its rows, in the same places."""
    metadata = {
        "version": ERASED_FORMAT_VERSION,
        "bucket_rows": _to_sparse(segment.bucket_rows),
        "first_rows": _to_sparse(segment.first_rows),
        "erased": np.flatnonzero(rows.erased).tolist(),
    }
    bucket = np.where(rows.erased, ERASED_BUCKET, rows.bucket).astype(np.int16)
    table = events_to_table(rows.events).set_column(0, EVENT_SCHEMA.field(0), pa.array(bucket))
    _write_table(path, table, segment.row_group_starts.tolist(), metadata)


def _write_parts(pending: Path, events: EventBatch, max_events: int) -> None:
    pending.mkdir()
    ordered = events.take(np.lexsort((events.event_key, events.timestamp_ms)))
    first_rows = np.zeros(NUM_BUCKETS, np.int64)
    starts = range(0, len(ordered), max_events)
    for part, start in enumerate(starts):
        chunk = ordered.take(slice(start, start + max_events))
        _write_file(pending / _part_name(part, len(starts)), chunk, first_rows)
        first_rows = first_rows + np.bincount(user_bucket(chunk.user_id), minlength=NUM_BUCKETS)
    sync_directory(pending)


def _write_file(path: Path, events: EventBatch, first_rows: NDArray[np.int64]) -> None:
    bucket = user_bucket(events.user_id)
    bucket_rows = np.bincount(bucket, minlength=NUM_BUCKETS)
    order = np.lexsort((events.event_key, events.timestamp_ms, bucket))
    metadata = {
        "version": FORMAT_VERSION,
        "bucket_rows": _to_sparse(bucket_rows),
        "first_rows": _to_sparse(first_rows),
    }
    _write_table(path, events_to_table(events.take(order)), _row_group_cuts(bucket_rows), metadata)


def _write_table(path: Path, table: pa.Table, cuts: list[int], metadata: dict[str, Any]) -> None:
    schema = EVENT_SCHEMA.with_metadata({METADATA_KEY: json.dumps(metadata).encode()})
    with path.open("xb") as file:
        with pq.ParquetWriter(
            file,
            schema,
            compression="lz4",
            use_dictionary=_REPETITIVE_COLUMNS,
            write_statistics=["timestamp_ms"],
            write_page_checksum=True,
        ) as writer:
            for start, end in pairwise(cuts):
                writer.write_table(
                    table.slice(start, end - start).replace_schema_metadata(schema.metadata),
                    row_group_size=end - start,
                )
        file.flush()
        os.fsync(file.fileno())


def _row_group_cuts(bucket_rows: NDArray[np.int64]) -> list[int]:
    """Row numbers at which row groups start and end: bucket boundaries, far enough apart."""
    cuts = [0]
    ends = np.cumsum(bucket_rows).tolist()
    for end in ends:
        if end - cuts[-1] >= _MIN_ROW_GROUP_EVENTS and ends[-1] - end >= _MIN_ROW_GROUP_EVENTS:
            cuts.append(end)
    return [*cuts, ends[-1]]


def _row_groups_of(
    segment: SegmentFile, starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[list[int], NDArray[np.int64]]:
    """Row groups that hold any of the row ranges, and the rows of the file that they contain."""
    group_starts, group_ends = segment.row_group_starts[:-1], segment.row_group_starts[1:]
    # Ranges ascend and don't overlap: the first that ends after a group's start decides.
    candidate = np.searchsorted(ends, group_starts, side="right")
    padded = np.append(starts, np.iinfo(np.int64).max)
    groups = np.flatnonzero(padded[candidate] < group_ends).tolist()
    rows = [np.arange(group_starts[group], group_ends[group]) for group in groups]
    return groups, np.concatenate(rows) if rows else np.empty(0, np.int64)


@contextmanager
def _open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a file, turning damage into `SegmentError`. Failures of the file system itself (no
    permission, too many open files) are not damage and pass through as `OSError`."""
    try:
        if path.stat().st_size == 0:
            raise SegmentError("the file is empty")
        mapped = pa.memory_map(str(path))
    except FileNotFoundError as error:
        raise SegmentError("the file is missing") from error
    with mapped as source:
        try:
            with pq.ParquetFile(source, page_checksum_verification=True) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            raise SegmentError(f"torn or not Parquet ({error})") from error


def _verified_footer(path: Path, file: pq.ParquetFile) -> SegmentFile:
    metadata = (file.schema_arrow.metadata or {}).get(METADATA_KEY)
    if metadata is None:
        raise SegmentError("a Parquet file that the event log did not write")
    if not file.schema_arrow.equals(EVENT_SCHEMA, check_metadata=False):
        raise SegmentError(
            f"wrong schema: expected {_describe(EVENT_SCHEMA)}, got {_describe(file.schema_arrow)}"
        )
    try:
        described = json.loads(metadata)
        version = described["version"]
        if version not in (FORMAT_VERSION, ERASED_FORMAT_VERSION):
            raise SegmentError(
                f"format version must be {FORMAT_VERSION} or {ERASED_FORMAT_VERSION}, got {version}"
            )
        bucket_rows = _from_sparse(described["bucket_rows"])
        first_rows = _from_sparse(described["first_rows"])
        erased = np.array(described.get("erased", []), np.int64)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, SegmentError):
            raise
        raise SegmentError(f"unreadable metadata ({error!r})") from error
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    if bucket_rows.sum() != sum(sizes):
        raise SegmentError(f"metadata promises {bucket_rows.sum()} rows, found {sum(sizes)}")
    starts = np.cumsum([0, *sizes], dtype=np.int64)
    return SegmentFile(path, first_rows, bucket_rows, starts, erased)


def _describe(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _to_sparse(counts: NDArray[np.int64]) -> dict[str, int]:
    return {str(bucket): int(counts[bucket]) for bucket in np.flatnonzero(counts)}


def _from_sparse(counts: dict[str, int]) -> NDArray[np.int64]:
    dense = np.zeros(NUM_BUCKETS, np.int64)
    for bucket, count in counts.items():
        dense[int(bucket)] = count
    return dense
