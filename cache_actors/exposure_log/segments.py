"""Segments of the exposure log: Parquet files in one directory per day (UTC).

A segment is written once, under a name that no other has, and appears whole or not at all; its name
tells the times of its first and last row, so that a reader leaves the others closed. Days that are
not needed any more may be deleted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cache_actors.atomic_files import pending_path, sync_directory
from cache_actors.exposure_log.schema import EXPOSURE_SCHEMA

METADATA_KEY = b"marm.exposure_log"
FORMAT_VERSION = b"1"

_DAY_NAME = re.compile(r"\d{4}-\d{2}-\d{2}")
_SEGMENT_NAME = re.compile(r"(\d{15})-(\d{15})-[0-9a-f]{32}\.parquet")


class ExposureSegmentError(ValueError):
    """A file under a segment's name that can't be read as one; the message says why."""


@dataclass(frozen=True)
class SegmentName:
    """Where a segment lives, and the times of its first and last row in milliseconds."""

    path: Path
    first_ms: int
    last_ms: int

    def overlaps(self, since_ms: int | None, until_ms: int | None) -> bool:
        """Whether it may hold rows of ``since_ms <= time_ms < until_ms``."""
        return (since_ms is None or self.last_ms >= since_ms) and (
            until_ms is None or self.first_ms < until_ms
        )


def write_segment(directory: Path, table: pa.Table) -> Path:
    """Commit the rows of ``table`` (at least one, in `EXPOSURE_SCHEMA`), durably; its path."""
    times = pc.min_max(table.column("time_ms")).as_py()
    day = directory / datetime.fromtimestamp(times["min"] / 1000, UTC).strftime("%Y-%m-%d")
    if not day.is_dir():
        day.mkdir(parents=True, exist_ok=True)
        sync_directory(directory)
    target = day / f"{times['min']:015d}-{times['max']:015d}-{uuid4().hex}.parquet"
    _write_as(table, target)
    return target


def list_segments(directory: Path) -> Iterator[SegmentName]:
    """The segments that are committed now, by name, oldest first; unfinished files are no segments.

    A directory that does not exist has none.
    """
    if not directory.is_dir():
        return
    for day in sorted(path for path in directory.iterdir() if _DAY_NAME.fullmatch(path.name)):
        for name in sorted(os.listdir(day)):
            match = _SEGMENT_NAME.fullmatch(name)
            if match:
                yield SegmentName(day / name, int(match[1]), int(match[2]))


def read_segment(path: Path) -> pa.Table:
    """The rows of a segment.

    Raises:
        ExposureSegmentError: it is damaged, or another program's file.
        FileNotFoundError: it was deleted meanwhile.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            metadata = file.schema_arrow.metadata or {}
            if metadata.get(METADATA_KEY) != FORMAT_VERSION:
                raise ExposureSegmentError(
                    f"expected a segment of format version {FORMAT_VERSION.decode()}, got "
                    f"{metadata.get(METADATA_KEY)!r}"
                )
            if not file.schema_arrow.equals(EXPOSURE_SCHEMA, check_metadata=False):
                raise ExposureSegmentError(
                    f"expected the columns {EXPOSURE_SCHEMA.names} with their types, got "
                    f"{file.schema_arrow.to_string(show_schema_metadata=False)}"
                )
            return file.read().replace_schema_metadata(None)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ExposureSegmentError(f"torn or not Parquet ({error})") from error


def rewrite_segment(path: Path, keep: Callable[[pa.Table], pa.Table]) -> int:
    """Replace a segment by the rows of it that ``keep`` returns, in one step; rows removed."""
    rows = read_segment(path)
    kept = keep(rows)
    if kept.num_rows == rows.num_rows:
        return 0
    if kept.num_rows:
        _write_as(kept, path)
    else:
        path.unlink()
        sync_directory(path.parent)
    return rows.num_rows - kept.num_rows


def _write_as(table: pa.Table, target: Path) -> None:
    pending = pending_path(target.parent)
    try:
        with pending.open("xb") as file:
            pq.write_table(
                table.replace_schema_metadata({METADATA_KEY: FORMAT_VERSION}),
                file,
                compression="zstd",
                write_page_checksum=True,
            )
            file.flush()
            os.fsync(file.fileno())
        pending.replace(target)
    finally:
        pending.unlink(missing_ok=True)
    sync_directory(target.parent)
