"""Transitions: what a query asks for, after what its user liked last.

Whoever liked one thing may want another next, whatever the two are worth on their own. A transition
is the pair of the tag of the user's newest positive row that the query sees and the tag asked for,
as a place in a table. The second of each two layers of `marm.error_memory` is told errors by it.

Shape legend: B queries, U users, N slab length, M candidates.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from marm.addressing import combine64, feature_slots
from marm.config import ModelConfig
from marm.events import BINARY_TASKS, TASKS, EventBatch
from marm.sequence import Queries, Slab, View

NOTHING = -1
"""The tag liked last of who liked nothing yet."""

_SALT = 7  # beside those of `marm.sparse.FEATURE_SALTS`; part of the stored format


class Transitions:
    """The transitions of queries of one model."""

    def __init__(self, config: ModelConfig) -> None:
        self._num_slots = config.num_slots
        self._bit = np.uint32(BINARY_TASKS.index(config.positive_task))
        self._label = TASKS.index(config.positive_task)

    def slots(self, liked: NDArray[np.int64], asked: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places of (tag liked last, tag asked for), in ``[0, num_slots)``."""
        return feature_slots(_SALT, combine64(liked, asked), self._num_slots)

    def liked_in_slab(self, slab: Slab, view: View, queries: Queries) -> NDArray[np.int64]:
        """Tag of the newest positive stored row that each query sees, ``[B]``, or `NOTHING`."""
        positive_UN = (slab.rows["feedback"] >> self._bit) & np.uint32(1) > 0
        hit_BN = view.visible & positive_UN[queries.user_row]
        if not hit_BN.shape[1]:
            return np.full(len(hit_BN), NOTHING, np.int64)
        column_B = hit_BN.argmax(axis=1)  # columns are newest first
        tag_B = slab.rows["tag_id"][queries.user_row, column_B].astype(np.int64)
        return np.where(hit_BN.any(axis=1), tag_B, NOTHING)

    def liked(
        self, events: EventBatch, block: View, in_slab_B: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The same with the batch's own events, which are newer than any stored row."""
        if not len(events):
            return in_slab_B
        hit_BB = block.visible & (events.labels[:, self._label] > 0)[None, :]
        rank_B = np.empty(len(events), np.int64)
        rank_B[np.lexsort((events.event_key, events.timestamp_ms))] = np.arange(len(events))
        newest_B = np.where(hit_BB, rank_B[None, :], -1).argmax(axis=1)
        return np.where(hit_BB.any(axis=1), events.tag_id[newest_B], in_slab_B)
