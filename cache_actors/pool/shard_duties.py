"""What a replica does beside answering: heartbeat, membership, expiry, checks and metrics."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

import ray

from cache_actors.pool.errors import HandoverLostError, MemoryUnavailable
from cache_actors.pool.home_lease import Heartbeat, HomeLease
from cache_actors.pool.leader_link import LeaderLink
from cache_actors.pool.metrics import ShardMetrics
from cache_actors.pool.replica_set import Member
from cache_actors.pool.shard_actors import is_registered
from cache_actors.pool.shard_core import ShardCore
from cache_actors.pool.shard_link import PoolInfo
from cache_actors.pool.shard_tier import ShardTier
from cache_actors.store.errors import MemoryStoreError
from marm.addressing import NUM_BUCKETS

logger = logging.getLogger(__name__)

_TICK_S = 0.5
_METRICS_INTERVAL_S = 5.0
_PEERS_INTERVAL_S = 3.0
_EXPIRE_INTERVAL_S = 60.0
_CHECK_INTERVAL_S = 60.0
_JOIN_CALL_S = 60.0


class ShardDuties:
    """Runs the duties from threads of its own, until the process ends."""

    def __init__(
        self,
        pool: PoolInfo,
        core: ShardCore,
        tier: ShardTier,
        metrics: ShardMetrics,
        lease: HomeLease,
        revive: Callable[[int, frozenset[str]], object],
    ) -> None:
        """``revive`` makes a replica whose actor is gone anew, not on the nodes it is given."""
        self._pool = pool
        self._revive = revive
        self._core = core
        self._tier = tier
        self._metrics = metrics
        self._leader = LeaderLink(pool, core.shard)
        self._due_s: dict[str, float] = {}
        self._next_checked = 0
        self._reviving = threading.Lock()
        self._is_retired = False
        enter(core)
        self._heartbeat = Heartbeat(lease, _leave)
        self._thread = threading.Thread(target=self._run, name="memory-duties", daemon=True)
        self._thread.start()

    def retire(self) -> None:
        """Make no peer anew from now on: the shard is being stopped."""
        with self._reviving:
            self._is_retired = True

    def _run(self) -> None:
        while True:
            try:
                self._tick()
            except (MemoryUnavailable, HandoverLostError, MemoryStoreError, OSError) as error:
                logger.debug("memory shard %d: %s", self._core.shard, error)
            except Exception:  # the duties must outlive whatever one round runs into
                logger.warning("memory shard %d", self._core.shard, exc_info=True)
            time.sleep(_TICK_S)

    def _tick(self) -> None:
        if not self._core.is_member:
            self._join()
        self._tier.lead(self._core.leads)
        self._tier.compare_again()
        if self._core.leads and self._is_due("peers", _PEERS_INTERVAL_S):
            self._revive_peers()
        if self._is_due("metrics", _METRICS_INTERVAL_S):
            self._publish()
        if self._is_due("expire", _EXPIRE_INTERVAL_S):
            self._core.store.expire(int(time.time()))
        if self._is_due("check", _CHECK_INTERVAL_S):
            self._check_bucket()

    def _is_due(self, duty: str, interval_s: float) -> bool:
        now = time.monotonic()
        if now < self._due_s.setdefault(duty, now + interval_s):
            return False
        self._due_s[duty] = now + interval_s
        return True

    def _join(self) -> None:
        """Have the leader bring this replica up to date."""
        core = self._core
        enter(core)
        if core.is_member:
            return
        call = self._leader.call
        number = call("begin_join", core.replica, timeout_s=_JOIN_CALL_S)
        while not call("copy_next", number, timeout_s=_JOIN_CALL_S).is_done:
            pass
        call("finish_join", number, core.store.generation, timeout_s=_JOIN_CALL_S)
        core.record.current()

    def _revive_peers(self) -> None:
        """Make replicas anew whose node was lost: they are bound to nodes, so Ray gave them up."""
        here = frozenset([ray.get_runtime_context().get_node_id()])
        for replica in range(self._pool.config.replicas):
            is_peer = replica != self._core.replica
            if not is_peer or is_registered(self._pool, self._core.shard, replica):
                continue
            with self._reviving:
                if not self._is_retired:
                    self._revive(replica, here)

    def _publish(self) -> None:
        for namespace in self._core.store.namespaces():
            store = self._core.store.open(namespace)
            backlog = self._tier.backlog_users(namespace)
            self._metrics.publish(namespace, store.stats(), backlog)

    def _check_bucket(self) -> None:
        """Check the rows of one more bucket, so that damage is found before it is read."""
        bucket, self._next_checked = self._next_checked, (self._next_checked + 1) % NUM_BUCKETS
        for namespace in self._core.store.namespaces():
            dropped = self._core.store.verify(namespace, bucket)
            if dropped:
                logger.warning(
                    "dropped %d damaged rows of %s in bucket %d", dropped, namespace.name, bucket
                )


def enter(core: ShardCore) -> None:
    """Be a member where that needs no other replica: nobody else ever was, or is left."""
    now = core.record.current()
    held = now.generation_of(core.replica)
    if held == core.store.generation:
        return
    if not now.without(core.replica):
        if held is not None:
            logger.warning(
                "memory shard %d starts empty: what it stored is gone, and nobody else has it",
                core.shard,
            )
        core.record.change(now, (Member(core.replica, core.store.generation),))
    elif held is not None:
        core.step_down(now)


def _leave() -> None:
    logger.error("another Ray cluster took this memory pool over; this shard ends")
    os._exit(1)
