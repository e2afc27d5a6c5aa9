"""`marm.memory.upsert_rows` for many users at once, without a Python loop over rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marm.events import merge_feedback
from marm.memory import RAW_STEP

_COMPUTED_FIELDS = ("written_step", "written_s", "memory", "scale")
"""What training computes; a raw row leaves it as it is. Not every layout has all of them."""


@dataclass(frozen=True)
class RowRuns:
    """Rows of several users, packed: user ``u`` owns ``rows[starts[u]:starts[u + 1]]``."""

    starts: NDArray[np.int64]  # [U + 1]
    rows: NDArray[np.void]

    @property
    def owner(self) -> NDArray[np.int64]:
        """The user of each row, by position."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))


def opaque(rows: NDArray[np.void]) -> NDArray[np.void]:
    """Rows as bytes without fields: numpy moves structured rows field by field."""
    return np.ascontiguousarray(rows).view(np.dtype((np.void, rows.dtype.itemsize)))


def expand_runs(start: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """``start[i], start[i] + 1, ...`` of ``count[i]`` numbers, run after run."""
    numbers = np.repeat(start - (np.cumsum(count) - count), count)
    numbers += np.arange(len(numbers))
    return numbers


def sort_rows(user_ids: NDArray[np.int64], rows: NDArray[np.void]) -> NDArray[np.int64]:
    """The order by user, time and event key; rows of one event stay in order of arrival."""
    times = np.ascontiguousarray(rows["timestamp_ms"])
    if (times[1:] > times[:-1]).all():  # a stream in time order
        return np.argsort(user_ids, kind="stable")
    return np.lexsort((rows["event_key"], times, user_ids))


def repeats_previous(run: NDArray[np.int64], rows: NDArray[np.void]) -> NDArray[np.bool_]:
    """Which of sorted rows are of the same event as the one before, ``[R]``."""
    repeats = np.zeros(len(rows), np.bool_)
    times, keys = rows["timestamp_ms"], rows["event_key"]
    np.logical_and(run[1:] == run[:-1], times[1:] == times[:-1], out=repeats[1:])
    repeats[1:] &= keys[1:] == keys[:-1]
    return repeats


@dataclass(frozen=True)
class SortedRows:
    """Rows to save (stored dtype), sorted by user, time and event key."""

    user_ids: NDArray[np.int64]  # [U], distinct
    starts: NDArray[np.int64]  # [U + 1]
    rows: NDArray[np.void]  # [R]

    @staticmethod
    def of(user_ids: NDArray[np.int64], rows: NDArray[np.void]) -> SortedRows:
        """The batch of ``rows[i]`` of ``user_ids[i]``."""
        order = sort_rows(user_ids, rows)
        sorted_users = user_ids[order]
        is_first = np.append(True, sorted_users[1:] != sorted_users[:-1])
        starts = np.append(np.flatnonzero(is_first), len(rows))
        rows = opaque(rows).take(order).view(rows.dtype)
        return SortedRows(sorted_users[starts[:-1]], starts, rows)

    @property
    def times(self) -> NDArray[np.int64]:
        """Time of each row."""
        times: NDArray[np.int64] = self.rows["timestamp_ms"]
        return times

    @property
    def keys(self) -> NDArray[np.uint64]:
        """Event key of each row."""
        keys: NDArray[np.uint64] = self.rows["event_key"]
        return keys

    @property
    def counts(self) -> NDArray[np.int64]:
        """Rows of each user."""
        return np.diff(self.starts)

    @property
    def owner(self) -> NDArray[np.int64]:
        """The user of each row, by position."""
        return np.repeat(np.arange(len(self.user_ids)), self.counts)


def upsert_runs(
    num_runs: int,
    old: NDArray[np.void],
    old_run: NDArray[np.int64],
    new: NDArray[np.void],
    new_run: NDArray[np.int64],
) -> RowRuns:
    """`marm.memory.upsert_rows` for many users at once; ``*_run`` tells the user of each row."""
    dtype = new.dtype
    rows = np.concatenate([opaque(old), opaque(new)]).view(dtype)
    run = np.concatenate([old_run, new_run])
    order = sort_rows(run, rows)
    rows, run = opaque(rows).take(order).view(dtype), run[order]
    repeats = repeats_previous(run, rows)
    if repeats.any():
        _fold_repeats(rows, repeats)
        kept = np.append(~repeats[1:], True)
        rows, run = opaque(rows)[kept].view(dtype), run[kept]
    return RowRuns(np.searchsorted(run, np.arange(num_runs + 1)), rows)


def _fold_repeats(rows: NDArray[np.void], repeats: NDArray[np.bool_]) -> None:
    """Merge each row that repeats the event of the one before it into itself, oldest first."""
    computed = [name for name in _COMPUTED_FIELDS if name in (rows.dtype.names or ())]
    position = np.arange(len(rows))
    first = np.maximum.accumulate(np.where(repeats, 0, position))
    rank = position - first
    for step in range(1, int(rank.max()) + 1):
        later = np.flatnonzero(rank == step)
        earlier = later - 1
        rows["feedback"][later] = merge_feedback(rows["feedback"][earlier], rows["feedback"][later])
        raw = rows["written_step"][later] == RAW_STEP
        for name in computed:
            rows[name][later[raw]] = rows[name][earlier[raw]]
