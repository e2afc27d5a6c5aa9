"""The Ray actors of a pool: made on the nodes where they belong, found, and stopped."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cache_actors.pool.errors import MemoryUnavailable
from cache_actors.pool.shard_link import PoolInfo, ShardLink

logger = logging.getLogger(__name__)


SHARD_THREADS = {"read": 4, "recall": 2, "write": 1, "receive": 1, "admin": 2}
"""Threads of a shard by concurrency group. Reads have their own, so that they never queue behind
writes; writes have one, which keeps the order in which each caller sent them. What other shards
send has one too: two shards that wait for each other would wait for ever if they shared it."""

_PEER_ANSWERS_S = 5.0


def create_replica(
    shard_class: type, pool: PoolInfo, shard: int, replica: int, avoid: frozenset[str]
) -> None:
    """Make the actor of a replica unless it is there already, not on the nodes ``avoid``."""
    ray.remote(concurrency_groups=SHARD_THREADS)(shard_class).options(
        name=pool.actor_name(shard, replica),
        namespace=pool.ray_namespace,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=0,
        scheduling_strategy=_strategy(pool, shard, replica, avoid),
    ).remote(pool, shard, replica)


def nodes_of_shard(pool: PoolInfo, shard: int) -> frozenset[str]:
    """Nodes on which replicas of a shard run already."""
    nodes = set()
    for replica in range(pool.config.replicas):
        if is_registered(pool, shard, replica):
            with contextlib.suppress(MemoryUnavailable):
                link = ShardLink(pool, shard, replica)
                nodes.add(link.call("describe", timeout_s=_PEER_ANSWERS_S).node_id)
    return frozenset(nodes)


def is_registered(pool: PoolInfo, shard: int, replica: int) -> bool:
    """Whether the actor of a replica exists, be it running or restarting."""
    try:
        ray.get_actor(pool.actor_name(shard, replica), namespace=pool.ray_namespace)
    except ValueError:
        return False
    return True


def stop_replica(pool: PoolInfo, shard: int, replica: int, timeout_s: float) -> None:
    """End a replica after its rows are safe on disk; one that does not run has ended already."""
    try:
        ShardLink(pool, shard, replica).call("flush", timeout_s=timeout_s)
        actor = ray.get_actor(pool.actor_name(shard, replica), namespace=pool.ray_namespace)
        ray.kill(actor)
    except (MemoryUnavailable, ValueError):
        return


def _strategy(pool: PoolInfo, shard: int, replica: int, avoid: frozenset[str]) -> Any:
    """A single replica may run anywhere. Several are bound to distinct nodes: one whose node is
    lost is made anew on another one, by its leader."""
    if pool.config.replicas == 1:
        return "SPREAD"
    alive = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
    free = [node for node in alive if node not in avoid]
    if len(alive) < pool.config.replicas:
        logger.warning(
            "%d replicas need as many nodes, but %d run: some share a node",
            pool.config.replicas,
            len(alive),
        )
    choice = free or alive
    return NodeAffinitySchedulingStrategy(choice[(shard + replica) % len(choice)], soft=False)
