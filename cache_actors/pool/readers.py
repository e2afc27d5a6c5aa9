"""The ways to read rows of one shard: from its files, by a call, or from the durable tier."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cache_actors.pool.errors import PartlyUnavailable
from cache_actors.pool.shard_link import ShardLink
from cache_actors.store.errors import MemoryStoreAbsentError
from cache_actors.store.lookup import Lookup, UserState
from cache_actors.store.mapped_shard import MappedShard
from cache_actors.store.namespace_store import StoreStats
from cache_actors.tiers.durable_tier import DurableTier
from marm.memory import Namespace, UserRows

Pending = Callable[[float], Lookup]
"""A lookup under way: given the seconds that are left for it, it waits and gives the rows."""


class CacheReader(Protocol):
    """A way to read rows of one namespace of one shard; ``tier`` names it."""

    tier: str

    def begin(
        self,
        user_ids: NDArray[np.int64],
        n: int,
        before_ms: NDArray[np.int64] | None,
        layers: int | None,
    ) -> Pending:
        """Begin a lookup (see `NamespaceStore.lookup`) and return without waiting for it."""
        ...


class LocalReader:
    """Reads the files of a replica on this node: a copy out of memory, and nobody is asked."""

    tier = "local"

    def __init__(self, replica: int, shard: MappedShard, namespace: Namespace) -> None:
        self.replica = replica
        self.generation = shard.generation
        self._shard = shard
        self._store = shard.open(namespace)
        self._reading = 0
        self._changed = threading.Condition()
        self._is_closed = False

    def begin(
        self,
        user_ids: NDArray[np.int64],
        n: int,
        before_ms: NDArray[np.int64] | None,
        layers: int | None,
    ) -> Pending:
        """See `CacheReader.begin`."""
        return lambda left_s: self._lookup(user_ids, n, before_ms, layers)

    def stats(self) -> StoreStats:
        """What the replica holds."""
        with self._open():
            return self._store.stats()

    def close(self) -> None:
        """Unmap the files once nobody reads them. Later reads fail, and another way is tried."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            while self._reading:
                self._changed.wait()
        self._shard.close()

    def _lookup(
        self,
        user_ids: NDArray[np.int64],
        n: int,
        before_ms: NDArray[np.int64] | None,
        layers: int | None,
    ) -> Lookup:
        with self._open():
            return self._store.lookup(user_ids, n, before_ms, layers=layers)

    @contextmanager
    def _open(self) -> Iterator[None]:
        with self._changed:
            if self._is_closed:
                raise MemoryStoreAbsentError(f"store {self._shard.directory} was closed")
            self._reading += 1
        try:
            yield
        finally:
            with self._changed:
                self._reading -= 1
                self._changed.notify_all()


class RemoteReader:
    """Asks a replica on another node: one call for all users of the shard."""

    tier = "remote"

    def __init__(self, link: ShardLink, namespace: Namespace) -> None:
        self.link = link
        self._namespace = namespace

    def begin(
        self,
        user_ids: NDArray[np.int64],
        n: int,
        before_ms: NDArray[np.int64] | None,
        layers: int | None,
    ) -> Pending:
        """See `CacheReader.begin`."""
        reply = self.link.submit("lookup", self._namespace, user_ids, n, before_ms, layers)

        def wait(left_s: float) -> Lookup:
            found: Lookup = self.link.result(reply, left_s)
            return found

        return wait


class TierReader:
    """Reads the durable tier, for as long as no replica of the shard can be reached.

    Rows of the last moments may be missing from it: it is written behind.
    """

    tier = "durable"

    def __init__(self, tier: DurableTier, namespace: Namespace) -> None:
        self._tier = tier
        self._namespace = namespace

    def begin(
        self,
        user_ids: NDArray[np.int64],
        n: int,
        before_ms: NDArray[np.int64] | None,
        layers: int | None,
    ) -> Pending:
        """See `CacheReader.begin`. The lookup raises `PartlyUnavailable` where a server of the tier
        is down too."""
        return lambda left_s: self._lookup(user_ids, n, before_ms, layers)

    def _lookup(
        self,
        user_ids: NDArray[np.int64],
        n: int,
        before_ms: NDArray[np.int64] | None,
        layers: int | None,
    ) -> Lookup:
        stored = self._tier.read(self._namespace, user_ids)
        rows = newest_rows(stored.rows, n, before_ms, self._namespace.layers_dtype(layers))
        state = np.where(stored.rows.counts > 0, UserState.FOUND, UserState.ABSENT)
        state[stored.damaged] = UserState.DAMAGED
        found = Lookup(rows, state.astype(np.uint8))
        if stored.unavailable.any():
            raise PartlyUnavailable(
                f"neither a replica nor the durable tier answers for "
                f"{int(stored.unavailable.sum())} of {len(user_ids)} users of a memory shard",
                found,
                stored.unavailable,
            )
        return found


def newest_rows(
    rows: UserRows, n: int, before_ms: NDArray[np.int64] | None, dtype: np.dtype
) -> UserRows:
    """The newest ``n`` rows of each user before a time, with the first layers as ``dtype`` has."""
    parts = []
    offsets = np.zeros(len(rows.user_ids) + 1, np.int64)
    for index in range(len(rows.user_ids)):
        mine = rows.of(index)
        if before_ms is not None:
            mine = mine[: int(np.searchsorted(mine["timestamp_ms"], before_ms[index]))]
        parts.append(mine[max(0, len(mine) - n) :])
        offsets[index + 1] = offsets[index] + len(parts[-1])
    found = np.concatenate(parts) if parts else np.empty(0, rows.rows.dtype)
    if found.dtype == dtype:
        return UserRows(rows.user_ids, offsets, found)
    narrow = np.empty(len(found), dtype)
    for name in dtype.names or ():
        wide = found[name]
        narrow[name] = wide[:, : dtype[name].shape[0]] if name == "memory" else wide
    return UserRows(rows.user_ids, offsets, narrow)
