"""Removing users from the exposure log."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from cache_actors.exposure_log.segments import (
    ExposureSegmentError,
    list_segments,
    rewrite_segment,
)


def erase_exposures(directory: Path, until_ms_of: Mapping[int, int]) -> int:
    """Remove each user's exposures up to and including their time; the number removed.

    Segments are replaced one by one, each in one step; repeating it does no harm. What a replica
    still buffers is written afterwards: repeat it after the longest flush interval.

    Raises:
        ExposureSegmentError: some segments are too damaged to be read; all others were cleaned.
    """
    removed, problems = 0, []
    for segment in list_segments(Path(directory)):
        if segment.first_ms > max(until_ms_of.values(), default=-1):
            continue
        try:
            removed += rewrite_segment(segment.path, partial(_without, until_ms_of))
        except FileNotFoundError:
            continue
        except ExposureSegmentError as error:
            problems.append(f"{segment.path}: {error}")
    if problems:
        raise ExposureSegmentError(
            f"{removed} exposures were removed, but some segments could not be read: "
            f"{'; '.join(problems)}. Delete them, then forget the users again"
        )
    return removed


def _without(until_ms_of: Mapping[int, int], rows: pa.Table) -> pa.Table:
    user_id = rows.column("user_id").to_numpy()
    time_ms = rows.column("time_ms").to_numpy()
    gone = np.zeros(rows.num_rows, np.bool_)
    for user, until_ms in until_ms_of.items():
        gone |= (user_id == user) & (time_ms <= until_ms)
    return rows.filter(pa.array(~gone))
