"""Reading exposures back, while replicas go on writing them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from cache_actors.exposure_log.schema import EXPOSURE_SCHEMA
from cache_actors.exposure_log.segments import (
    ExposureSegmentError,
    list_segments,
    read_segment,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExposureScan:
    """Rows in `EXPOSURE_SCHEMA`, oldest first, and the segments that could not be read."""

    rows: pa.Table
    damaged: tuple[str, ...]


def read_exposures(
    directory: Path, since_ms: int | None = None, until_ms: int | None = None
) -> pa.Table:
    """Exposures of ``since_ms <= time_ms < until_ms`` (milliseconds since 1970), oldest first.

    Damaged segments are left out and named in a warning; `scan_exposures` returns their names.
    """
    return scan_exposures(directory, since_ms, until_ms).rows


def scan_exposures(
    directory: Path, since_ms: int | None = None, until_ms: int | None = None
) -> ExposureScan:
    """Like `read_exposures`, with the names of the segments that could not be read.

    Raises:
        ValueError: the times are the wrong way round.
    """
    if since_ms is not None and until_ms is not None and since_ms > until_ms:
        raise ValueError(f"since_ms must be at most until_ms={until_ms}, got {since_ms}")
    tables, damaged = [EXPOSURE_SCHEMA.empty_table()], []
    for segment in list_segments(Path(directory)):
        if not segment.overlaps(since_ms, until_ms):
            continue
        try:
            tables.append(_within(read_segment(segment.path), since_ms, until_ms))
        except FileNotFoundError:  # its day was deleted, or all its users forgotten, just now
            continue
        except ExposureSegmentError as error:
            logger.warning("exposures of %s are left out: %s", segment.path, error)
            damaged.append(str(segment.path))
    rows = pa.concat_tables(tables)
    return ExposureScan(rows.sort_by([("time_ms", "ascending")]), tuple(damaged))


def _within(rows: pa.Table, since_ms: int | None, until_ms: int | None) -> pa.Table:
    times = rows.column("time_ms")
    if since_ms is not None:
        rows = rows.filter(pc.greater_equal(times, since_ms))
        times = rows.column("time_ms")
    if until_ms is not None:
        rows = rows.filter(pc.less(times, until_ms))
    return rows
