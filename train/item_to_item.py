"""Item-to-item: which item a user turns to after another, counted over the stream.

The baseline that retrieval has to beat: no model, only counts of consecutive positive events.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_PAIRS = 4_000_000
"""Pairs that are counted, 16 bytes each; beyond it the rarest are forgotten."""

PENDING_PAIRS = 1 << 16
"""Pairs that wait, unsorted, to be merged with the counted ones."""

_LOW = np.int64(0xFFFFFFFF)


class ItemToItem:
    """Counts of ordered pairs of items, given as places (see `train.seen_catalog`)."""

    def __init__(self) -> None:
        self._keys = np.empty(0, np.int64)  # from << 32 | to, sorted
        self._counts = np.empty(0, np.int64)
        self._pending = np.empty(0, np.int64)

    def __len__(self) -> int:
        """Number of distinct pairs that are counted, but for those that wait."""
        return len(self._keys)

    def add(self, before: NDArray[np.int64], after: NDArray[np.int64]) -> None:
        """Count pairs of consecutive positive events."""
        self._pending = np.concatenate([self._pending, before << 32 | after])
        if len(self._pending) >= PENDING_PAIRS:
            self._merge()

    def scores(self, seeds: NDArray[np.int64], num_items: int) -> NDArray[np.float64]:
        """How often each of the first ``num_items`` places came after one of ``seeds``."""
        seeds = np.unique(seeds)
        first = np.searchsorted(self._keys, seeds << 32)
        last = np.searchsorted(self._keys, (seeds + 1) << 32)
        scores = np.zeros(num_items)
        for start, end in zip(first.tolist(), last.tolist(), strict=True):
            after = self._keys[start:end] & _LOW
            known = after < num_items
            scores[after[known]] += self._counts[start:end][known]
        waiting = self._pending[np.isin(self._pending >> 32, seeds)] & _LOW
        np.add.at(scores, waiting[waiting < num_items], 1.0)
        return scores

    def _merge(self) -> None:
        keys, inverse = np.unique(np.concatenate([self._keys, self._pending]), return_inverse=True)
        ones = np.ones(len(self._pending), np.int64)
        counts = np.zeros(len(keys), np.int64)
        np.add.at(counts, inverse, np.concatenate([self._counts, ones]))
        if len(keys) > MAX_PAIRS:
            # The rarest go, and of equally rare ones those of the items seen first.
            kept = np.sort(np.argsort(counts, kind="stable")[-MAX_PAIRS // 2 :])
            keys, counts = keys[kept], counts[kept]
        self._keys, self._counts = keys, counts
        self._pending = np.empty(0, np.int64)

    def state(self) -> dict[str, NDArray[np.int64]]:
        """Arrays; `load` reads them back."""
        return {"keys": self._keys, "counts": self._counts, "pending": self._pending}

    def load(self, state: dict[str, NDArray[np.int64]]) -> None:
        """Continue from `state`."""
        self._keys, self._counts = state["keys"], state["counts"]
        self._pending = state["pending"]
