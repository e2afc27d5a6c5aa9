"""Where users are, as a client knows it: the placement, kept up to date by what shards answer."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from cache_actors.pool.errors import MemoryUnavailable
from cache_actors.pool.leader_link import LeaderLink
from cache_actors.pool.placement import Placement, load_placement
from cache_actors.pool.shard_link import PoolInfo


class Routes:
    """The shards of a pool and what each owns. Safe to use from several threads."""

    def __init__(self, pool: PoolInfo, ask_timeout_s: float) -> None:
        self._pool = pool
        self._timeout_s = ask_timeout_s
        self._placement = pool.placement
        self._shards: list[LeaderLink] = []
        self._lock = threading.Lock()
        self._follow(pool.placement)

    @property
    def placement(self) -> Placement:
        """The newest placement that is known."""
        return self._placement

    def shard(self, number: int) -> LeaderLink:
        """The link to one shard."""
        return self._shards[number]

    def refresh(self, refused: NDArray[np.int64] | None = None, by: int | None = None) -> None:
        """Read the placement again. ``refused`` are buckets that shard ``by`` does not own: whoever
        moves them may not have written that down yet, so then the shards themselves are asked."""
        with self._lock:
            stored = load_placement(self._pool.placement_path)
            if stored.version >= self._placement.version:
                self._follow(stored)
            if refused is None or by is None:
                return
            owners = np.array(self._placement.shard_of_bucket)
            if (owners[refused] == by).any():
                self._ask_owners(refused, by)

    def _follow(self, placement: Placement) -> None:
        while len(self._shards) < placement.num_shards:
            self._shards.append(LeaderLink(self._pool, len(self._shards)))
        self._placement = placement

    def _ask_owners(self, refused: NDArray[np.int64], by: int) -> None:
        found = self._placement
        try:  # a bucket on its way has two owners, and only the one that is left by it counts
            refused = refused[~self._shards[by].call("owned", timeout_s=self._timeout_s)[refused]]
        except MemoryUnavailable:
            return
        for shard in range(found.num_shards):
            if shard == by or not len(refused):
                continue
            try:
                owned = self._shards[shard].call("owned", timeout_s=self._timeout_s)
            except MemoryUnavailable:
                continue
            for bucket in refused[owned[refused]].tolist():
                if found.shard_of_bucket[bucket] == by:
                    found = found.routed(bucket, shard)
        self._placement = found
