"""A bounded sample of a stream that does not depend on order or on who saw what.

Every event has a hash; the sample is the events of the smallest hashes. So the samples of several
workers merge into the sample of all, and a resumed run ends with that of an unbroken one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class RankSample:
    """Ranks of the true item under several methods, of a sample of events.

    Shape legend: B events, S methods.
    """

    def __init__(self, capacity: int, num_methods: int) -> None:
        self._capacity = capacity
        self.hashes = np.empty(0, np.uint64)
        self.ranks_BS = np.empty((0, num_methods))
        self.candidates = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.hashes)

    def wants(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which events may still be in the sample."""
        if len(self) < self._capacity:
            return np.ones(len(hashes), np.bool_)
        return hashes < self.hashes[-1]

    def add(
        self,
        hashes: NDArray[np.uint64],
        ranks_BS: NDArray[np.float64],
        candidates: NDArray[np.int64],
    ) -> None:
        """Add events with the ranks of their true items among so many candidates."""
        hashes = np.concatenate([self.hashes, hashes])
        ranks = np.concatenate([self.ranks_BS, ranks_BS])
        among = np.concatenate([self.candidates, candidates])
        # Of one event reported twice, and hashes that collide, the order is that of the ranks.
        order = np.lexsort((*ranks.T[::-1], hashes))[: self._capacity]
        self.hashes, self.ranks_BS, self.candidates = hashes[order], ranks[order], among[order]

    def state(self) -> dict[str, NDArray]:
        """Arrays; `extend` reads them back."""
        return {"hashes": self.hashes, "ranks": self.ranks_BS, "candidates": self.candidates}

    def extend(self, state: dict[str, NDArray]) -> None:
        """Add the sample of another worker, or of a checkpoint."""
        self.add(state["hashes"], state["ranks"], state["candidates"])
