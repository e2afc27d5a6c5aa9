"""Rows of an attempt that was lost: stored by steps that this run has yet to take.

A run that continues from a checkpoint repeats the steps after it, whose rows are already stored. Of
events in order none is seen too early, as a fetch ends before the events it serves. But a row of an
event that came late may lie before them, and the first time it was not there yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marm.memory import Memory, UserRows


@dataclass(frozen=True)
class LostRows:
    """Which rows this run has yet to compute, as of a step.

    Attributes:
        since_s: when the run began, in Unix seconds: older rows are not its own.
        from_step: the step that is about to be taken.
    """

    since_s: int
    from_step: int

    def covers(self, rows: NDArray[np.void]) -> NDArray[np.bool_]:
        """Which of ``rows`` were computed by this run at ``from_step`` or later."""
        covered: NDArray[np.bool_] = rows["written_step"] >= self.from_step
        if covered.any():
            covered &= rows["written_s"] >= self.since_s
        return covered


def fetch_without(
    lost: LostRows,
    memory: Memory,
    user_ids: NDArray[np.int64],
    n: int,
    before_ms: NDArray[np.int64],
) -> UserRows:
    """`Memory.fetch` as it was before the ``lost`` rows were stored: the newest ``n`` others."""
    asked = n
    while True:
        fetched = memory.fetch(user_ids, asked, before_ms)
        is_kept = ~lost.covers(fetched.rows)
        if is_kept.all():
            return _newest(fetched, is_kept, n) if asked > n else fetched
        kept = _newest(fetched, is_kept, n)
        # Where a user had all that was asked for, there may be older rows to take their place.
        if not ((fetched.counts == asked) & (kept.counts < n)).any():
            return kept
        asked *= 2


def _newest(fetched: UserRows, is_kept: NDArray[np.bool_], n: int) -> UserRows:
    num_users = len(fetched.user_ids)
    owner = np.repeat(np.arange(num_users), fetched.counts)[is_kept]
    counts = np.bincount(owner, minlength=num_users)
    is_newest = np.arange(len(owner)) >= np.cumsum(counts)[owner] - n
    offsets = np.concatenate([[0], np.cumsum(np.minimum(counts, n))])
    return UserRows(fetched.user_ids, offsets, fetched.rows[is_kept][is_newest])
