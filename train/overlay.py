"""Rows that were computed but not yet acknowledged by the memory.

Saving is asynchronous, so a fetch may or may not see the newest rows. The overlay adds what is
pending to what was fetched; both have the same identity (user, time, event key), so the result is
the same whichever of them the fetch saw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marm.events import merge_feedback_runs
from marm.memory import Ack, UserRows


@dataclass(frozen=True)
class PendingSave:
    """Rows under way to the memory."""

    user_ids: NDArray[np.int64]
    rows: NDArray[np.void]
    ack: Ack


class Overlay:
    """Pending saves of one worker, oldest first; at most ``max_pending`` of them.

    One thread may fetch (`settle`, then `merge`) while another waits in `flush`. A save is dropped
    by `settle` alone, before a fetch begins: what is acknowledged during a fetch may be missing
    from it and has to be laid over it all the same.
    """

    def __init__(self, max_pending: int = 4) -> None:
        self._pending: tuple[PendingSave, ...] = ()
        self._max_pending = max_pending

    def add(self, save: PendingSave) -> None:
        """Remember a save; waits for the oldest ones when too many are under way. Not to be called
        during a fetch.

        Raises:
            Exception: whatever an old save failed with.
        """
        for old in self._pending[: max(0, len(self._pending) + 1 - self._max_pending)]:
            old.ack.wait()
        self._pending = (*self._pending, save)[-self._max_pending :]

    def settle(self) -> None:
        """Forget the oldest saves, if acknowledged: any fetch that starts now sees them.

        Raises:
            Exception: whatever a finished save failed with.
        """
        # Oldest first: a newer save of a row must not be forgotten while an older one is laid over.
        num_done = 0
        while num_done < len(self._pending) and self._pending[num_done].ack.done():
            self._pending[num_done].ack.wait()
            num_done += 1
        self._pending = self._pending[num_done:]

    def flush(self) -> None:
        """Wait until every row is acknowledged.

        Raises:
            Exception: whatever a save failed with.
        """
        for save in self._pending:
            save.ack.wait()

    def merge(self, fetched: UserRows, n: int, before_ms: NDArray[np.int64]) -> UserRows:
        """``fetched`` (of a fetch with ``n`` and ``before_ms`` that began after `settle`) with the
        pending rows of its users, newest ``n`` of each again."""
        pending = self._pending
        if not pending or not len(fetched.user_ids):
            return fetched
        rows = np.concatenate([save.rows for save in pending])
        owners = np.concatenate([save.user_ids for save in pending])
        by_id = np.argsort(fetched.user_ids, kind="stable")
        at = np.minimum(np.searchsorted(fetched.user_ids[by_id], owners), len(fetched.user_ids) - 1)
        position = by_id[at]
        wanted = (fetched.user_ids[position] == owners) & (
            rows["timestamp_ms"] < before_ms[position]
        )
        if not wanted.any():
            return fetched
        return _newest(fetched, position[wanted], rows[wanted], n)


def _newest(
    fetched: UserRows, position: NDArray[np.int64], extra: NDArray[np.void], n: int
) -> UserRows:
    num_users = len(fetched.user_ids)
    user = np.concatenate([np.repeat(np.arange(num_users), fetched.counts), position])
    rows = np.concatenate([fetched.rows, extra])
    age = np.arange(len(rows))  # later ones are newer versions of the same row
    keys = (age, rows["event_key"], rows["timestamp_ms"], user)
    order = np.lexsort(keys)
    user, stamp, key = user[order], rows["timestamp_ms"][order], rows["event_key"][order]
    is_latest = np.append(
        (np.diff(user) != 0) | (np.diff(stamp) != 0) | (key[1:] != key[:-1]), True
    )
    starts = np.flatnonzero(np.append(True, is_latest[:-1]))
    feedback = merge_feedback_runs(rows["feedback"][order], starts)
    order, user = order[is_latest], user[is_latest]
    counts = np.bincount(user, minlength=num_users)
    ends = np.cumsum(counts)
    is_newest = np.arange(len(user)) >= ends[user] - n
    offsets = np.concatenate([[0], np.cumsum(np.minimum(counts, n))])
    newest = rows[order[is_newest]]
    newest["feedback"] = feedback[is_newest]
    return UserRows(fetched.user_ids, offsets, newest)
