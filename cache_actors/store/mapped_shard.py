"""The store of one shard as any process of its node reads it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from cache_actors.store.errors import MemoryStoreAbsentError, MemoryStoreError
from cache_actors.store.lmdb_environment import open_environment
from cache_actors.store.namespace_store import NamespaceStore
from marm.memory import Namespace

STORE_FORMAT = 3
"""Version of the stored layout."""

FORMAT_KEY = b"format"


class MappedShard:
    """A shard's store as any process of its node reads it. Safe to use from several threads."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._env = open_environment(directory, readonly=True)
        self._stores: dict[Namespace, NamespaceStore] = {}
        self._lock = threading.Lock()
        try:
            self._facts = self._env.table(b"facts")  # not within a transaction that uses it
            self.generation = self._env.read(self._read_generation)
        except BaseException:
            self._env.close()
            raise

    def open(self, namespace: Namespace) -> NamespaceStore:
        """The store of ``namespace``; `MemoryStoreAbsentError` where its writer has not made it."""
        with self._lock:
            store = self._stores.get(namespace)
            if store is None:
                store = NamespaceStore(self._env, self.directory, namespace)
                self._stores[namespace] = store
            return store

    def close(self) -> None:
        """Close every store."""
        with self._lock:
            while self._stores:
                self._stores.popitem()[1].close()
        self._env.close()

    def _read_generation(self, transaction: Any) -> str:
        stored = transaction.get(FORMAT_KEY, None, self._facts)
        if stored is None:
            raise MemoryStoreAbsentError(
                f"store {self.directory} is not initialised yet; let its writer open it first"
            )
        return generation_of(bytes(stored), self.directory)


def generation_of(stored: bytes, directory: Path) -> str:
    """The generation that a store's format fact names; refuses other formats."""
    try:
        fact = json.loads(stored)
        found, generation = fact["format"], str(fact["generation"])
    except (ValueError, KeyError, TypeError) as error:
        raise MemoryStoreError(
            f"{directory} is not a memory store ({error!r}); use another directory"
        ) from error
    if found != STORE_FORMAT:
        raise MemoryStoreError(
            f"store {directory} must have format {STORE_FORMAT}, has {found}; delete that "
            "directory and replay the event log"
        )
    return generation
