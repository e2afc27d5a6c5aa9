"""The faults: each kills something at once, and waits until what it hit is whole again.

One fault at a time: the next one comes when the pool has got over the last.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.perf.faults.audit import audit_client
from benchmarks.perf.faults.cluster import RunningNodes, await_whole
from benchmarks.perf.faults.ledger import Ledger
from benchmarks.perf.redis_server import RedisServer
from cache_actors.pool.client import MemoryClient
from cache_actors.pool.errors import MemoryUnavailable
from cache_actors.pool.shard_info import ShardInfo
from cache_actors.pool.shard_link import PoolInfo

RECOVERED_HIT_RATE = 0.999
HIT_RATE_DEADLINE_S = 60.0

_OUTAGE_S = (0.5, 2.5)


@dataclass(frozen=True)
class Killed:
    """What a fault was, and how long it took until all was as before.

    Attributes:
        moved_replicas: replicas that run on another node afterwards, though theirs is alive. With
            disks of their own they would have to fill up again from their peer or the durable tier.
        hit_rate_before, hit_rate_after: share of the acknowledged rows that a client reads; of a
            node's loss only.
        hit_rate_back_s: from the loss of a node until the hit rate was as before, or was given up.
    """

    kind: str
    target: str
    recovered_s: float
    hit_rate_before: float | None = None
    hit_rate_after: float | None = None
    hit_rate_back_s: float | None = None
    moved_replicas: int = 0


Kill = Callable[[], Killed]


def kill_shard(pool: PoolInfo, rng: np.random.Generator) -> Killed:
    """SIGKILL to the process of a random replica of a random shard."""
    infos = await_whole(pool)
    victim = infos[rng.integers(len(infos))]
    started = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    infos_after = await_whole(pool, frozenset({victim.pid}))
    recovered_s = time.monotonic() - started
    moved = _places(infos_after).symmetric_difference(_places(infos))
    name = f"shard {victim.shard} replica {victim.replica}"
    return Killed("shard", name, recovered_s, moved_replicas=len(moved) // 2)


def kill_redis(server: RedisServer, rng: np.random.Generator) -> Killed:
    """SIGKILL to Redis, which comes back empty after a while."""
    started = time.monotonic()
    server.kill()
    time.sleep(rng.uniform(*_OUTAGE_S))
    server.start()
    return Killed("redis", "redis-server", time.monotonic() - started)


def kill_node(
    nodes: RunningNodes,
    pool: PoolInfo,
    client: MemoryClient,
    ledger: Ledger,
    rng: np.random.Generator,
) -> Killed:
    """The loss of a random node, its processes and its files; another node joins afterwards."""
    infos = await_whole(pool)
    victims = sorted({info.node_id for info in infos} & set(nodes.worker_ids()))
    victim = victims[rng.integers(len(victims))]
    gone = frozenset(info.pid for info in infos if info.node_id == victim)
    before = _hit_rate(client, ledger) or 0.0
    started = time.monotonic()
    nodes.lose(victim, pool)

    after = 0.0
    while after < RECOVERED_HIT_RATE * before and time.monotonic() - started < HIT_RATE_DEADLINE_S:
        after = _hit_rate(client, ledger) or 0.0
    back_s = time.monotonic() - started
    nodes.add()
    await_whole(pool, gone)
    return Killed(
        "node",
        f"node with {len(gone)} replicas",
        time.monotonic() - started,
        before,
        after,
        back_s,
    )


def _hit_rate(client: MemoryClient, ledger: Ledger) -> float | None:
    """Share of the acknowledged rows that a client reads; None if it cannot read at all."""
    try:
        compared = audit_client(client, ledger)
    except MemoryUnavailable:
        return None
    return compared.found_rows / max(1, compared.expected_rows)


def _places(infos: list[ShardInfo]) -> set[tuple[int, int, str]]:
    return {(info.shard, info.replica, info.node_id) for info in infos}
