"""The faults: each kills something at once, and waits until what it hit is whole again.

One fault at a time: the next one comes when the pool has got over the last.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from benchmarks.perf.faults.audit import audit_client
from benchmarks.perf.faults.cluster import RunningNodes, await_whole
from benchmarks.perf.faults.ledger import Ledger
from benchmarks.perf.redis_server import RedisServer
from cache_actors.pool.client import MemoryClient
from cache_actors.pool.errors import MemoryUnavailable
from cache_actors.pool.placement import BucketMove
from cache_actors.pool.rebalance import rebalance
from cache_actors.pool.shard_info import ShardInfo
from cache_actors.pool.shard_link import PoolInfo

RECOVERED_HIT_RATE = 0.999
HIT_RATE_DEADLINE_S = 60.0

_OUTAGE_S = (0.5, 2.5)
_MOVES_BEFORE_KILL = 40


@dataclass(frozen=True)
class Killed:
    """What a fault was, and how long it took until all was as before.

    Attributes:
        over_at: when all was as before, in Unix seconds.
        moved_replicas: replicas that run on another node afterwards, though theirs is alive. With
            disks of their own they would have to fill up again from their peer or the durable tier.
        hit_rate_before, hit_rate_after: share of the acknowledged rows that a client reads; of a
            node's loss and of moves only.
        lowest_hit_rate: of reads while buckets moved; reads that a killed shard failed aside.
        hit_rate_back_s: from the loss of a node until the hit rate was as before, or was given up.
    """

    kind: str
    target: str
    recovered_s: float
    hit_rate_before: float | None = None
    hit_rate_after: float | None = None
    hit_rate_back_s: float | None = None
    lowest_hit_rate: float | None = None
    moved_replicas: int = 0
    over_at: float = field(default_factory=time.time)


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


def kill_while_buckets_move(
    pool: PoolInfo,
    num_shards: int,
    client: MemoryClient,
    ledger: Ledger,
    rng: np.random.Generator,
) -> Killed:
    """SIGKILL to a random shard in the middle of a rebalance to ``num_shards`` shards."""
    victim = rng.choice(np.array([info.pid for info in await_whole(pool)]))
    kill_at, num_moved = int(rng.integers(1, _MOVES_BEFORE_KILL)), 0

    def moved(move: BucketMove) -> None:
        nonlocal num_moved
        num_moved += 1
        if num_moved == kill_at:
            os.kill(int(victim), signal.SIGKILL)

    before = _hit_rate(client, ledger) or 0.0
    started = time.monotonic()
    lowest = before
    with ThreadPoolExecutor(1, "rebalance") as thread:
        moving = thread.submit(rebalance, pool, num_shards, on_move=moved)
        while not moving.done():
            rate = _hit_rate(client, ledger)
            lowest = lowest if rate is None else min(lowest, rate)
        report = moving.result()
    await_whole(pool, frozenset({int(victim)}))
    return Killed(
        "shard_while_buckets_move",
        f"{report.buckets_moved} buckets, {report.num_shards_before} to {num_shards} shards",
        time.monotonic() - started,
        before,
        _hit_rate(client, ledger),
        lowest_hit_rate=lowest,
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
