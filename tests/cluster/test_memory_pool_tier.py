"""A pool with Redis behind it: what is evicted or lost comes back, and Redis may go away."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray
from redis_servers import TestServer, redis_server

from cache_actors.pool.client import MemoryClient
from cache_actors.pool.config import PoolConfig
from cache_actors.pool.lifecycle import connect_pool, describe_pool, start_pool, stop_pool
from cache_actors.pool.rebalance import rebalance
from cache_actors.pool.shard_link import PoolInfo, ShardLink
from cache_actors.store.limits import StoreLimits
from cache_actors.tiers.durable_tier import DurableTierUnavailableError
from cache_actors.tiers.redis_tier import RedisTier
from cache_actors.transfer.pool_memory import PoolMemory
from marm.memory import Namespace, UserRows

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]

NAMESPACE = Namespace(depth=4, dim=64)
NUM_USERS = 400
USERS = np.arange(NUM_USERS)
ROWS_PER_USER = 120
DEADLINE_S = 60.0


def make_rows(first: int = 0, per_user: int = ROWS_PER_USER) -> tuple[np.ndarray, np.ndarray]:
    """Rows ``first..first + per_user`` of every user."""
    user_ids = np.repeat(USERS, per_user)
    rows = np.zeros(len(user_ids), NAMESPACE.row_dtype)
    rows["timestamp_ms"] = np.tile(np.arange(first, first + per_user), NUM_USERS)
    rows["event_key"] = rows["timestamp_ms"].astype(np.uint64) * NUM_USERS + user_ids
    rows["written_step"] = 1
    rows["memory"] = 0.5
    return user_ids, rows


def save_all(client: MemoryClient, first: int = 0, per_user: int = ROWS_PER_USER) -> None:
    user_ids, rows = make_rows(first, per_user)
    acks = [
        client.save(user_ids[start : start + 1024], rows[start : start + 1024])
        for start in range(0, len(rows), 1024)
    ]
    for ack in acks:
        ack.wait(DEADLINE_S)


@pytest.fixture
def redis() -> Iterator[TestServer]:
    with redis_server() as server:
        yield server


def start(home: Path, redis: TestServer, num_shards: int = 1, **limits: int) -> PoolInfo:
    config = PoolConfig(redis_url=redis.url, limits=StoreLimits(**limits))
    return start_pool(home, num_shards, config=config)


def eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_all_rows(client: MemoryClient, users: np.ndarray) -> bool:
    return client.fetch(users, 1000).counts.tolist() == [ROWS_PER_USER] * len(users)


def counts_in_tier(redis: TestServer, pool: PoolInfo) -> list[int]:
    tier = RedisTier.connect(redis.url, pool.tier_name)
    try:
        counts: list[int] = tier.get(NAMESPACE, USERS).counts.tolist()
        return counts
    finally:
        tier.close()


def test_users_beyond_the_budget_come_back_from_redis(tmp_path: Path, redis: TestServer) -> None:
    pool = start(tmp_path, redis, max_bytes=20 << 20)
    with MemoryClient(pool, NAMESPACE) as client:
        save_all(client)
        held = client.stats().shards[0].held
        assert held is not None
        assert held.counters.evicted_users > 0
        for start_user in range(0, NUM_USERS, 50):
            users = USERS[start_user : start_user + 50]
            assert client.fetch(users, 1000).counts.tolist() == [ROWS_PER_USER] * 50
        assert client.stats().fetched.recalled_users > 0
    stop_pool(pool)


def test_a_lost_store_is_filled_from_redis(tmp_path: Path, redis: TestServer) -> None:
    pool = start(tmp_path, redis)
    with MemoryClient(pool, NAMESPACE) as client:
        save_all(client)
        expected = client.fetch(USERS, 1000)
        eventually(lambda: counts_in_tier(redis, pool) == [ROWS_PER_USER] * NUM_USERS)
        (info,) = describe_pool(pool)
        shutil.rmtree(info.path)
        os.kill(info.pid, signal.SIGKILL)
        client.save(*make_rows(ROWS_PER_USER, 1)).wait(DEADLINE_S)
        eventually(lambda: client.fetch(USERS, 1000).counts.min() == ROWS_PER_USER + 1)
        found = client.fetch(USERS, 1000, np.full(NUM_USERS, ROWS_PER_USER))
        assert found.rows.tobytes() == expected.rows.tobytes()
        eventually(lambda: describe_pool(pool)[0].is_warm)
    stop_pool(pool)


def test_rows_are_read_from_redis_while_a_shard_is_down(tmp_path: Path, redis: TestServer) -> None:
    pool = start(tmp_path, redis)
    with MemoryClient(pool, NAMESPACE) as client:
        save_all(client)
        expected = client.fetch(USERS, 7, layers=2)
        eventually(lambda: counts_in_tier(redis, pool) == [ROWS_PER_USER] * NUM_USERS)
        for reader in client._reads.readers:
            reader._node_id = "another"
            reader.close()
        ray.kill(ray.get_actor(pool.actor_name(0), namespace=pool.ray_namespace))
        found = client.fetch(USERS, 7, layers=2)
        assert found.rows.tobytes() == expected.rows.tobytes()
        before = client.fetch(USERS, 7, np.full(NUM_USERS, 5), layers=0)
        assert before.counts.tolist() == [5] * NUM_USERS
    start_pool(pool.home)
    stop_pool(pool)


def test_redis_may_go_away_and_come_back(tmp_path: Path, redis: TestServer) -> None:
    pool = start(tmp_path, redis)
    with MemoryClient(pool, NAMESPACE) as client:
        save_all(client, 0, 20)
        eventually(lambda: counts_in_tier(redis, pool) == [20] * NUM_USERS)
        redis.kill()
        save_all(client, 20, 20)
        assert client.fetch(USERS, 1000).counts.tolist() == [40] * NUM_USERS
        redis.restart()  # empty
        eventually(lambda: counts_in_tier(redis, pool) == [40] * NUM_USERS)
    stop_pool(pool)


def test_forgotten_users_are_forgotten_in_redis_too(tmp_path: Path, redis: TestServer) -> None:
    pool = start(tmp_path, redis)
    with MemoryClient(pool, NAMESPACE) as client:
        save_all(client)
        eventually(lambda: counts_in_tier(redis, pool) == [ROWS_PER_USER] * NUM_USERS)
        ShardLink(pool, 0).call("forget", 7, ROWS_PER_USER, timeout_s=DEADLINE_S)
        assert client.fetch(USERS[7:8], 1000).counts.tolist() == [0]
        assert counts_in_tier(redis, pool)[7] == 0
        save_all(client)  # a replay
        assert client.fetch(USERS[7:8], 1000).counts.tolist() == [0]
    stop_pool(pool)


def test_a_user_forgotten_while_redis_is_down_is_forgotten_there_later(
    tmp_path: Path, redis: TestServer
) -> None:
    pool = start(tmp_path, redis)
    with MemoryClient(pool, NAMESPACE) as client:
        save_all(client)
        eventually(lambda: counts_in_tier(redis, pool) == [ROWS_PER_USER] * NUM_USERS)
        redis.pause()
        with pytest.raises(DurableTierUnavailableError, match="forget the user again then"):
            ShardLink(pool, 0).call("forget", 7, ROWS_PER_USER, timeout_s=DEADLINE_S)
        assert client.fetch(USERS[7:8], 1000).counts.tolist() == [0]
        redis.resume()
        eventually(lambda: counts_in_tier(redis, pool)[7] == 0)
    stop_pool(pool)


def test_a_dropped_namespace_is_dropped_in_redis_too(tmp_path: Path, redis: TestServer) -> None:
    pool = start(tmp_path, redis)
    with MemoryClient(pool, NAMESPACE) as client:
        save_all(client, 0, 20)
        eventually(lambda: counts_in_tier(redis, pool) == [20] * NUM_USERS)
        ShardLink(pool, 0).call("drop_namespace", NAMESPACE, timeout_s=DEADLINE_S)
        assert counts_in_tier(redis, pool) == [0] * NUM_USERS
        assert client.fetch(USERS, 1000).counts.tolist() == [0] * NUM_USERS
    stop_pool(pool)


def test_restored_rows_reach_redis(tmp_path: Path, redis: TestServer) -> None:
    pool = start(tmp_path, redis)
    _, rows = make_rows(0, 20)
    with PoolMemory(pool) as memory:
        save_all(memory.client(NAMESPACE), 20, 1)
        eventually(lambda: counts_in_tier(redis, pool) == [1] * NUM_USERS)
        memory.restore(NAMESPACE, UserRows(USERS, np.arange(0, len(rows) + 1, 20), rows))
        eventually(lambda: counts_in_tier(redis, pool) == [21] * NUM_USERS)
    stop_pool(pool)


def test_pools_of_two_homes_share_a_redis(tmp_path: Path, redis: TestServer) -> None:
    first, second = start(tmp_path / "first", redis), start(tmp_path / "second", redis)
    assert connect_pool(first.home).tier_name == first.tier_name != second.tier_name
    with MemoryClient(first, NAMESPACE) as client:
        save_all(client, 0, 20)
        eventually(lambda: counts_in_tier(redis, first) == [20] * NUM_USERS)
    assert counts_in_tier(redis, second) == [0] * NUM_USERS
    stop_pool(first)
    stop_pool(second)
    again = start_pool(first.home)
    assert again.tier_name == first.tier_name
    stop_pool(again)


def test_evicted_users_are_found_after_their_bucket_moved(
    tmp_path: Path, redis: TestServer
) -> None:
    pool = start(tmp_path, redis, max_bytes=20 << 20)
    with MemoryClient(pool, NAMESPACE) as client:
        save_all(client)
        rebalance(pool, 3)
        for start_user in range(0, NUM_USERS, 50):
            users = USERS[start_user : start_user + 50]
            eventually(partial(has_all_rows, client, users))
    stop_pool(pool)
