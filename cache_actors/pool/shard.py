"""A shard of the memory pool as a Ray actor: the one writer of its stores."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
from numpy.typing import NDArray

from cache_actors.pool.shard_stores import ShardStores
from cache_actors.store.lmdb_memory import StoreStats
from marm.memory import Namespace, UserRows

SHARD_THREADS = {"read": 4, "write": 1, "admin": 1}
"""Threads of a shard by concurrency group. Reads have their own, so that they never queue behind
writes; writes have one, which keeps the order in which each caller sent them."""


@dataclass(frozen=True)
class ShardInfo:
    """Where a shard runs: a process on ``node_id`` reads ``path`` itself, others ask the actor."""

    shard: int
    epoch: int
    node_id: str
    pid: int
    path: Path
    max_rows_per_user: int | None


class MemoryShard:
    """Writes the namespaces of one shard, and reads them for other nodes. Everything it holds is
    on disk, so that a restarted actor continues where the killed one stopped."""

    def __init__(
        self, shard: int, epoch: int, directory: Path, max_rows_per_user: int | None
    ) -> None:
        self._shard = shard
        self._epoch = epoch
        self._directory = directory
        self._max_rows = max_rows_per_user
        self._stores = ShardStores(directory, max_rows_per_user, readonly=False)

    @ray.method(concurrency_group="write")
    def save(
        self, namespace: Namespace, user_ids: NDArray[np.int64], rows: NDArray[np.void]
    ) -> None:
        """See `LmdbMemory.save`; the reply is the acknowledgement."""
        self._stores.of(namespace).save(user_ids, rows)

    @ray.method(concurrency_group="read")
    def fetch(
        self,
        namespace: Namespace,
        user_ids: NDArray[np.int64],
        n: int,
        before_ms: NDArray[np.int64] | None,
    ) -> UserRows:
        """See `LmdbMemory.fetch`."""
        return self._stores.of(namespace).fetch(user_ids, n, before_ms)

    @ray.method(concurrency_group="admin")
    def open_namespace(self, namespace: Namespace) -> None:
        """Make the store of ``namespace`` exist, so that readers on this node can map it."""
        self._stores.of(namespace)

    @ray.method(concurrency_group="admin")
    def stats(self, namespace: Namespace) -> StoreStats:
        """What the shard holds of ``namespace``."""
        return self._stores.of(namespace).stats()

    @ray.method(concurrency_group="admin")
    def describe(self) -> ShardInfo:
        """Where this shard runs."""
        return ShardInfo(
            self._shard,
            self._epoch,
            ray.get_runtime_context().get_node_id(),
            os.getpid(),
            self._directory,
            self._max_rows,
        )

    @ray.method(concurrency_group="write")
    def flush(self) -> None:
        """Return when every row saved before is safe from a crash of the machine."""
        self._stores.flush()
