"""A replica of a shard of the memory pool as a Ray actor: the one writer of its store."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import ray
from numpy.typing import NDArray

from cache_actors.pool.changes import (
    Change,
    NamespaceDropped,
    NamespaceOpened,
    RowsRestored,
    UsersForgotten,
)
from cache_actors.pool.errors import MemoryUnavailable
from cache_actors.pool.handover import CopyProgress
from cache_actors.pool.home_lease import HomeLease, PoolInUseError
from cache_actors.pool.metrics import ShardMetrics
from cache_actors.pool.node_note import note_node
from cache_actors.pool.placement import load_placement
from cache_actors.pool.replica_set import ReplicaRecord
from cache_actors.pool.shard_actors import create_replica
from cache_actors.pool.shard_core import PEER_TIMEOUT_S, ShardCore, take_lead
from cache_actors.pool.shard_duties import ShardDuties
from cache_actors.pool.shard_info import ShardInfo
from cache_actors.pool.shard_link import POOL_EPOCH, PoolInfo, ShardLink
from cache_actors.pool.shard_tier import ShardTier
from cache_actors.store.errors import StoreInUseError
from cache_actors.store.lookup import ALL_ROWS, Lookup
from cache_actors.store.namespace_store import StoreStats
from cache_actors.store.shard_store import ShardStore
from marm.addressing import NUM_BUCKETS
from marm.memory import Namespace, UserRows

logger = logging.getLogger(__name__)

_LEADER_ANSWERS_S = 3.0


class MemoryShard:
    """Writes the namespaces of one replica, and reads them for other nodes. Everything it holds is
    on disk, so that a restarted actor continues where the killed one stopped."""

    def __init__(self, pool: PoolInfo, shard: int, replica: int) -> None:
        self._pool, self._shard, self._replica = pool, shard, replica
        lease = HomeLease(pool.directory, cluster_id())
        if not lease.beat():
            raise PoolInUseError(f"another Ray cluster runs the memory pool at {pool.directory}")
        owned = np.zeros(NUM_BUCKETS, np.bool_)
        owned[load_placement(pool.placement_path).buckets_of(shard)] = True
        self._store = _open_store(pool, shard, replica, owned)
        self._tier = ShardTier(
            self._store, pool.config.redis_url, pool.tier_name, pool.config.limits
        )
        self._core = ShardCore(
            shard,
            replica,
            self._store,
            lambda other: ReplicaRecord(pool.record_directory(other)),
            lambda to, number: _LinkedPeer(ShardLink(pool, to, number)),
            self._tier.recall,
        )
        self._metrics = ShardMetrics(shard, replica)
        revive = partial(create_replica, MemoryShard, pool, shard)
        self._duties = ShardDuties(pool, self._core, self._tier, self._metrics, lease, revive)
        note_node(pool, shard, replica, ray.get_runtime_context().get_node_id())
        gc.freeze()  # saves make many small objects; what is here already need not be looked at

    @ray.method(concurrency_group="write")
    def save(
        self, namespace: Namespace, user_ids: NDArray[np.int64], rows: NDArray[np.void]
    ) -> None:
        """See `marm.memory.Memory.save`; the reply is the acknowledgement."""
        with self._metrics.timed_write(namespace):
            unknown = self._tier.absent_before(namespace, user_ids)
            self._core.save(namespace, user_ids, rows)
            self._tier.complete_later(namespace, unknown)

    @ray.method(concurrency_group="write")
    def forget(self, user_id: int, until_ms: int) -> None:
        """Remove a user's rows up to a time, here and in the durable tier, for good. While the tier
        does not answer it raises after the first; see `ShardTier.forget`."""
        self._core.commit(UsersForgotten({user_id: until_ms}))
        self._tier.forget(user_id, until_ms)

    @ray.method(concurrency_group="write")
    def open_namespace(self, namespace: Namespace) -> None:
        """Make the store of ``namespace`` exist, so that readers on the node can map it."""
        if namespace not in self._store.namespaces():
            self._core.commit(NamespaceOpened(namespace))

    @ray.method(concurrency_group="write")
    def drop_namespace(self, namespace: Namespace) -> None:
        """Remove a namespace with its rows, here and in the durable tier. Where that does not
        answer it raises after the first; call it again when the tier is back."""
        self._core.commit(NamespaceDropped(namespace))
        self._tier.drop(namespace, np.flatnonzero(self._store.owned()))

    @ray.method(concurrency_group="write")
    def begin_move(self, buckets: Sequence[int], shard: int) -> int:
        """See `ShardCore.begin_move`."""
        return self._core.begin_move(buckets, shard)

    @ray.method(concurrency_group="write")
    def finish_move(self, number: int) -> None:
        """See `ShardCore.finish_move`."""
        self._core.finish_move(number)

    @ray.method(concurrency_group="write")
    def clear_buckets(self, buckets: Sequence[int]) -> None:
        """Remove the rows of buckets that another shard owns by now."""
        self._core.clear_moved(buckets)

    @ray.method(concurrency_group="write")
    def begin_join(self, replica: int) -> int:
        """See `ShardCore.begin_join`."""
        return self._core.begin_join(replica)

    @ray.method(concurrency_group="write")
    def finish_join(self, number: int, generation: str) -> None:
        """See `ShardCore.finish_join`."""
        self._core.finish_join(number, generation)

    @ray.method(concurrency_group="write")
    def copy_next(self, number: int) -> CopyProgress:
        """See `ShardCore.copy_next`."""
        return self._core.copy_next(number)

    @ray.method(concurrency_group="write")
    def flush(self) -> None:
        """Return when every row saved before is safe from a crash of the machine."""
        self._store.flush()

    @ray.method(concurrency_group="receive")
    def receive(self, change: Change, as_member: bool) -> None:
        """See `ShardCore.receive`."""
        self._core.receive(change, as_member=as_member)
        if isinstance(change, RowsRestored):
            self._tier.compare_later()

    @ray.method(concurrency_group="read")
    def lookup(
        self,
        namespace: Namespace,
        user_ids: NDArray[np.int64],
        n: int,
        before_ms: NDArray[np.int64] | None,
        layers: int | None,
    ) -> Lookup:
        """See `NamespaceStore.lookup`."""
        self._core.check_member()
        with self._metrics.timed_read(namespace):
            found = self._store.open(namespace).lookup(user_ids, n, before_ms, layers=layers)
        self._store.touch(namespace, user_ids.tolist())
        return found

    @ray.method(concurrency_group="recall")
    def recall(self, namespace: Namespace, user_ids: NDArray[np.int64]) -> None:
        """Bring users' rows back from the durable tier, so that the next lookup finds them."""
        self._tier.recall(namespace, user_ids)

    @ray.method(concurrency_group="recall")
    def repair(self, namespace: Namespace, user_ids: NDArray[np.int64]) -> None:
        """Drop damaged rows of users, and bring back what another member or the tier has."""
        self._core.repair(namespace, user_ids)

    @ray.method(concurrency_group="admin")
    def touch(self, namespace: Namespace, user_ids: NDArray[np.int64]) -> None:
        """Users that readers on this node have read: they are evicted last."""
        self._store.touch(namespace, user_ids.tolist())

    @ray.method(concurrency_group="admin")
    def stats(self, namespace: Namespace) -> StoreStats:
        """What the shard holds of ``namespace``."""
        return self._store.open(namespace).stats()

    @ray.method(concurrency_group="admin")
    def namespaces(self) -> list[Namespace]:
        """The namespaces that have been opened here."""
        return self._store.namespaces()

    @ray.method(concurrency_group="admin")
    def users(self, namespace: Namespace, bucket: int) -> NDArray[np.int64]:
        """Users of a bucket that have rows here, or in the durable tier."""
        return self._store.open(namespace).users(bucket)

    @ray.method(concurrency_group="admin")
    def forgotten(self) -> dict[int, int]:
        """Users that asked to be forgotten, and until when (ms)."""
        return self._store.forgotten()

    @ray.method(concurrency_group="admin")
    def owned(self) -> NDArray[np.bool_]:
        """Which of the buckets this shard owns."""
        self._core.check_member()
        return self._store.owned()

    @ray.method(concurrency_group="admin")
    def take_lead(self) -> None:
        """Lead the shard if its leader is gone."""
        now = self._core.record.current()
        if now.leader in (None, self._replica):
            return
        try:
            link = ShardLink(self._pool, self._shard, now.leader)
            link.call("describe", timeout_s=_LEADER_ANSWERS_S)
        except MemoryUnavailable:
            take_lead(self._core, now)

    @ray.method(concurrency_group="admin")
    def retire(self) -> None:
        """See `ShardDuties.retire`."""
        self._duties.retire()

    @ray.method(concurrency_group="admin")
    def describe(self) -> ShardInfo:
        """Where this replica runs."""
        return ShardInfo(
            self._shard,
            self._replica,
            POOL_EPOCH,
            ray.get_runtime_context().get_node_id(),
            os.getpid(),
            self._store.directory,
            self._store.generation,
            self._core.is_member,
            self._core.leads,
            self._tier.is_warm,
            self._pool.config,
        )


@dataclass(frozen=True)
class _LinkedPeer:
    link: ShardLink

    def receive(self, change: Change, *, as_member: bool) -> None:
        self.link.call("receive", change, as_member, timeout_s=PEER_TIMEOUT_S)

    def rows_of(self, namespace: Namespace, user_ids: NDArray[np.int64]) -> UserRows:
        found: Lookup = self.link.call(
            "lookup", namespace, user_ids, ALL_ROWS, None, None, timeout_s=PEER_TIMEOUT_S
        )
        return found.rows


def _open_store(pool: PoolInfo, shard: int, replica: int, owned: NDArray[np.bool_]) -> ShardStore:
    """The replica's store, once no other process writes it. An actor that raises while it starts is
    never started again, so a process that takes its time to end is waited for."""
    while True:
        try:
            return ShardStore(
                pool.store_directory(shard, replica),
                limits=pool.config.limits,
                durability=pool.config.durability,
                owned=owned,
            )
        except StoreInUseError as error:
            logger.warning("memory shard %d waits to be let in: %s", shard, error)


def cluster_id() -> str:
    """What tells this Ray cluster from others that run at the same time."""
    address: str = ray.get_runtime_context().gcs_address
    return address
