"""The Ray actors of a pool: made on the nodes where they belong, found, and stopped."""

from __future__ import annotations

import contextlib
import logging

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cache_actors.pool.errors import MemoryUnavailable
from cache_actors.pool.node_note import noted_node
from cache_actors.pool.shard_link import PoolInfo, ShardLink
from cache_actors.store.errors import MemoryStoreError

logger = logging.getLogger(__name__)


SHARD_THREADS = {"read": 4, "recall": 2, "write": 1, "receive": 1, "admin": 2}
"""Threads of a shard by concurrency group. Reads have their own, so that they never queue behind
writes; writes have one, which keeps the order in which each caller sent them. What other shards
send has one too: two shards that wait for each other would wait for ever if they shared it."""

_PEER_ANSWERS_S = 5.0

_SOME_BYTES = 1
"""Ray puts an actor that asks for no resource at all on a random node, whatever node it should
rather be on. What is asked for is only booked, and one byte does not matter."""


def create_replica(
    shard_class: type, pool: PoolInfo, shard: int, replica: int, avoid: frozenset[str]
) -> str:
    """Make the actor of a replica unless it is there already, not on the nodes ``avoid``.

    It is made on the node that has its files, else on one by its number; which one is returned. A
    killed process is restarted there, since its files are there.

    A single replica goes elsewhere if that node is lost. Several are bound to distinct nodes: one
    whose node is lost is made anew on another one, by its leader.
    """
    node_id = _node_for(pool, shard, replica, avoid)
    is_single = pool.config.replicas == 1
    ray.remote(concurrency_groups=SHARD_THREADS)(shard_class).options(
        name=pool.actor_name(shard, replica),
        namespace=pool.ray_namespace,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        memory=_SOME_BYTES,
        max_restarts=-1,
        max_task_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=is_single),
    ).remote(pool, shard, replica)
    return node_id


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


def retire_replica(pool: PoolInfo, shard: int, replica: int) -> None:
    """Tell a replica not to make its peer anew when that is stopped. One that restarts just now
    does not hear it: whoever stops a shard ends its replicas again and again until none is left."""
    if is_registered(pool, shard, replica):
        with contextlib.suppress(MemoryUnavailable):
            ShardLink(pool, shard, replica).call("retire", timeout_s=_PEER_ANSWERS_S)


def flush_replica(pool: PoolInfo, shard: int, replica: int, timeout_s: float) -> None:
    """Have a replica bring its rows to the disk. One that cannot is stopped all the same: its rows
    survive that too, only not a crash of the machine soon after."""
    if not is_registered(pool, shard, replica):
        return
    try:
        ShardLink(pool, shard, replica).call("flush", timeout_s=timeout_s)
    except (MemoryUnavailable, MemoryStoreError) as error:
        logger.warning("stopping a memory shard that could not be flushed: %s", error)


def end_replica(pool: PoolInfo, shard: int, replica: int) -> None:
    """End the actor of a replica for good, if there is one."""
    with contextlib.suppress(ValueError):
        actor = ray.get_actor(pool.actor_name(shard, replica), namespace=pool.ray_namespace)
        ray.kill(actor)


def _node_for(pool: PoolInfo, shard: int, replica: int, avoid: frozenset[str]) -> str:
    """The node that has a replica's files if it lives, else one by the replica's number."""
    alive = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
    if len(alive) < pool.config.replicas:
        logger.warning(
            "%d replicas need as many nodes, but %d run: some share a node",
            pool.config.replicas,
            len(alive),
        )
    choice = [node for node in alive if node not in avoid] or alive
    noted = noted_node(pool, shard, replica)
    if noted is not None and noted in choice:
        return noted
    return choice[(shard + replica) % len(choice)]
