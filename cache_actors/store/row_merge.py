"""`marm.memory.upsert_rows` for many users at once, without a Python loop over rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marm.events import merge_feedback
from marm.memory import RAW_STEP


@dataclass(frozen=True)
class RowRuns:
    """Rows of several users, packed: user ``u`` owns ``rows[starts[u]:starts[u + 1]]``."""

    starts: NDArray[np.int64]  # [U + 1]
    rows: NDArray[np.void]


def upsert_runs(
    row_dtype: np.dtype,
    num_runs: int,
    old: Sequence[bytes | bytearray | memoryview],
    old_run: NDArray[np.int64],
    new: NDArray[np.void],
    new_run: NDArray[np.int64],
) -> RowRuns:
    """`marm.memory.upsert_rows` for many users at once; ``*_run`` tells the user of each row.

    ``old`` holds stored rows as bytes, in the order of ``old_run``.
    """
    # Whole rows are moved as opaque bytes: numpy copies structured rows field by field.
    opaque = np.dtype((np.void, row_dtype.itemsize))
    data = bytearray().join([*old, np.ascontiguousarray(new).view(opaque).data])
    rows = np.frombuffer(data, row_dtype)
    run = np.concatenate([old_run, new_run])
    # The sort is stable, so rows of one event stay in order of arrival.
    order = np.lexsort((rows["event_key"], rows["timestamp_ms"], run))
    rows = rows.view(opaque).take(order).view(row_dtype)
    run = run[order]
    repeats = (
        (run[1:] == run[:-1])
        & (rows["timestamp_ms"][1:] == rows["timestamp_ms"][:-1])
        & (rows["event_key"][1:] == rows["event_key"][:-1])
    )
    if repeats.any():
        repeats = np.concatenate([[False], repeats])
        _fold_repeats(rows, repeats)
        kept = np.append(~repeats[1:], True)
        rows = rows.view(opaque)[kept].view(row_dtype)
        run = run[kept]
    return RowRuns(np.searchsorted(run, np.arange(num_runs + 1)), rows)


def _fold_repeats(rows: NDArray[np.void], repeats: NDArray[np.bool_]) -> None:
    """Merge each row that repeats the event of the one before it into itself, oldest first."""
    position = np.arange(len(rows))
    first = np.maximum.accumulate(np.where(repeats, 0, position))
    rank = position - first
    for step in range(1, int(rank.max()) + 1):
        later = np.flatnonzero(rank == step)
        earlier = later - 1
        rows["feedback"][later] = merge_feedback(rows["feedback"][earlier], rows["feedback"][later])
        raw = rows["written_step"][later] == RAW_STEP
        rows["memory"][later[raw]] = rows["memory"][earlier[raw]]
        for field in ("written_step", "written_s"):
            rows[field][later[raw]] = rows[field][earlier[raw]]
