"""What the users of a micro-batch did before each of its events, as the models of it see it.

A user's past is his stored rows from before the event and then his earlier events of the batch that
enter the sequence, whichever of them are not stored yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marm.events import BINARY_TASKS, TASKS, EventBatch
from marm.memory import UserRows
from marm.sequence import enters_sequence


@dataclass(frozen=True)
class Past:
    """Items of a user's past, oldest first."""

    items: NDArray[np.int64]
    positive: NDArray[np.bool_]


class BatchHistory:
    """The past of each event of a batch.

    Args:
        events: the batch.
        rows: stored rows, with an entry for every user of the batch.
        sequence: `Namespace.sequence`.
        task: the binary task whose positive events are told apart.
        n: at most so many newest rows are seen.
    """

    def __init__(
        self, events: EventBatch, rows: UserRows, sequence: str, task: str, n: int
    ) -> None:
        self._events, self._rows, self._n = events, rows, n
        self._enters = enters_sequence(events, sequence)
        self.positive_B = events.labels[:, TASKS.index(task)] > 0
        bit = np.uint32(1 << BINARY_TASKS.index(task))
        self._row_is_positive = rows.rows["feedback"] & bit > 0
        order = np.argsort(rows.user_ids, kind="stable")
        self._user_row_B = order[np.searchsorted(rows.user_ids[order], events.user_id)]

    def past(self, index: int) -> Past:
        """The past of the event at ``index``."""
        events, user_row = self._events, self._user_row_B[index]
        now_ms = events.timestamp_ms[index]
        start, end = self._rows.offsets[user_row : user_row + 2].tolist()
        stamps = self._rows.rows["timestamp_ms"][start:end]
        end = start + int(np.searchsorted(stamps, now_ms))
        newest_ms = self._rows.rows["timestamp_ms"][end - 1] if end > start else None
        own = (self._user_row_B == user_row) & self._enters & (events.timestamp_ms < now_ms)
        if newest_ms is not None:
            own &= events.timestamp_ms > newest_ms
        items = np.concatenate([self._rows.rows["item_id"][start:end], events.item_id[own]])
        positive = np.concatenate([self._row_is_positive[start:end], self.positive_B[own]])
        return Past(items[-self._n :], positive[-self._n :])

    def consecutive_positives(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positive events of the batch, by index, and the item of the positive event that its user
        had before each; those without one are left out."""
        events, stored = self._events, self._rows
        index = np.flatnonzero(self.positive_B)
        index = index[np.lexsort((events.timestamp_ms[index], self._user_row_B[index]))]
        user_row, stamps = self._user_row_B[index], events.timestamp_ms[index]
        is_first = np.append(True, user_row[1:] != user_row[:-1])[: len(index)]
        first = np.flatnonzero(is_first)
        # Of the stored positives from before the first one in the batch, the newest.
        since_ms = np.full(len(stored.user_ids), np.iinfo(np.int64).min)
        since_ms[user_row[first]] = stamps[first]
        counts = np.diff(stored.offsets)
        is_before = stored.rows["timestamp_ms"] < np.repeat(since_ms, counts)
        candidates = np.flatnonzero(self._row_is_positive & is_before)
        newest = np.searchsorted(candidates, stored.offsets[user_row[first] + 1]) - 1
        row = candidates[newest] if len(candidates) else newest
        found = (newest >= 0) & (row >= stored.offsets[user_row[first]])
        # Of two at the same time neither came before the other.
        inside = np.flatnonzero(
            ~is_first & np.append(False, stamps[1:] > stamps[:-1])[: len(index)]
        )
        before = [stored.rows["item_id"][row[found]], events.item_id[index[inside - 1]]]
        return np.concatenate([index[first[found]], index[inside]]), np.concatenate(before)
