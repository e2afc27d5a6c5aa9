"""The stores of one shard: one per namespace, in one directory."""

from __future__ import annotations

import threading
from pathlib import Path

from cache_actors.store.lmdb_memory import LmdbMemory
from marm.memory import Namespace


class ShardStores:
    """Opens each namespace of a shard once, when it is first used. Safe to use from threads."""

    def __init__(self, directory: Path, max_rows_per_user: int | None, readonly: bool) -> None:
        self._directory = directory
        self._max_rows = max_rows_per_user
        self._readonly = readonly
        self._stores: dict[Namespace, LmdbMemory] = {}
        self._lock = threading.Lock()

    def of(self, namespace: Namespace) -> LmdbMemory:
        """The store of ``namespace``; a writer makes it where it is missing."""
        store = self._stores.get(namespace)
        if store is not None:
            return store
        with self._lock:
            if namespace not in self._stores:
                self._stores[namespace] = LmdbMemory(
                    self._directory / namespace.name,
                    namespace,
                    readonly=self._readonly,
                    max_rows_per_user=self._max_rows,
                )
            return self._stores[namespace]

    def flush(self) -> None:
        """Make all saved rows survive a crash of the machine too."""
        for store in list(self._stores.values()):
            store.flush()

    def close(self) -> None:
        """Close every store."""
        with self._lock:
            while self._stores:
                self._stores.popitem()[1].close()
