"""Two replicas per shard: what they hold, and what is served while one of them is gone."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray
from event_stream import EVENT_NAMESPACE, event_rows

from cache_actors.pool.client import MemoryClient
from cache_actors.pool.config import PoolConfig
from cache_actors.pool.errors import MemoryUnavailable
from cache_actors.pool.leader_link import LeaderLink
from cache_actors.pool.lifecycle import describe_pool, start_pool, stop_pool
from cache_actors.pool.rebalance import rebalance
from cache_actors.pool.shard_actors import is_registered
from cache_actors.pool.shard_info import ShardInfo
from cache_actors.pool.shard_link import PoolInfo, ShardLink
from cache_actors.store.mapped_shard import MappedShard
from marm.memory import InProcessMemory

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]

NAMESPACE = EVENT_NAMESPACE
NUM_USERS = 60
USERS = np.arange(NUM_USERS)
make_rows = partial(event_rows, NUM_USERS)
DEADLINE_S = 60.0


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[PoolInfo]:
    started = start_pool(tmp_path, 2, config=PoolConfig(replicas=2))
    yield started
    stop_pool(started)


@pytest.fixture
def clients(pool: PoolInfo) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def await_infos(pool: PoolInfo, are_right: Callable[[list[ShardInfo]], bool]) -> list[ShardInfo]:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            infos = describe_pool(pool)
            if are_right(infos):
                return infos
        except MemoryUnavailable:
            pass
        assert time.monotonic() < deadline, "the pool does not become what it should"
        time.sleep(0.05)


def all_members(infos: list[ShardInfo]) -> bool:
    return all(info.is_member for info in infos)


def content(info: ShardInfo) -> bytes:
    """Everything a replica's own files hold."""
    mapped = MappedShard(info.path)
    try:
        found = mapped.open(NAMESPACE).fetch(USERS, 10**6)
        return found.offsets.tobytes() + found.rows.tobytes()
    finally:
        mapped.close()


def assert_replicas_equal(pool: PoolInfo, count: int) -> None:
    """Both replicas of each shard hold the same, and together the first ``count`` rows."""
    infos = await_infos(pool, all_members)
    for first, second in zip(infos[::2], infos[1::2], strict=True):
        assert (first.shard, first.replica, second.replica) == (second.shard, 0, 1)
        assert content(first) == content(second)
    reference = InProcessMemory(NAMESPACE)
    reference.save(*make_rows(count))
    expected = reference.fetch(USERS, 10**6)
    with MemoryClient(pool, NAMESPACE) as client:
        found = client.fetch(USERS, 10**6)
    assert found.offsets.tolist() == expected.offsets.tolist()
    assert found.rows.tobytes() == expected.rows.tobytes()


def test_both_replicas_hold_every_acknowledged_row(pool: PoolInfo, clients: ExitStack) -> None:
    client = clients.enter_context(MemoryClient(pool, NAMESPACE))
    client.save(*make_rows(1000)).wait(DEADLINE_S)
    infos = describe_pool(pool)
    assert [info.leads for info in infos].count(True) == 2
    assert len({info.path for info in infos}) == 4
    assert_replicas_equal(pool, 1000)


@pytest.mark.parametrize("which", ["leader", "follower"])
def test_killed_replicas_lose_nothing_and_catch_up(
    pool: PoolInfo, clients: ExitStack, which: str
) -> None:
    writer = clients.enter_context(MemoryClient(pool, NAMESPACE))
    reader = clients.enter_context(MemoryClient(pool, NAMESPACE))
    acknowledged = 0
    stop = threading.Event()
    problems: list[str] = []

    def write() -> None:
        nonlocal acknowledged
        while not stop.is_set():
            writer.save(*make_rows(256, acknowledged)).wait(DEADLINE_S)
            acknowledged += 256

    def read() -> None:
        while not stop.wait(0.01):
            promised = acknowledged
            found = int((reader.fetch(USERS, 10**6).rows["event_key"] < promised).sum())
            if found != promised:
                problems.append(f"{promised} rows acknowledged, {found} read")

    def guard(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            problems.append(repr(error))
            stop.set()

    threads = [threading.Thread(target=guard, args=(work,)) for work in (write, read)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            infos = await_infos(pool, all_members)
            victim = next(info for info in infos if info.leads == (which == "leader"))
            os.kill(victim.pid, signal.SIGKILL)
            before = acknowledged
            deadline = time.monotonic() + DEADLINE_S
            while acknowledged < before + 1024 and not stop.is_set():
                assert time.monotonic() < deadline, "the writer does not go on after a kill"
                stop.wait(0.01)
    finally:
        stop.set()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert problems == []
    assert_replicas_equal(pool, acknowledged)


def test_a_replica_that_lost_its_files_is_filled_by_its_peer(
    pool: PoolInfo, clients: ExitStack
) -> None:
    client = clients.enter_context(MemoryClient(pool, NAMESPACE))
    client.save(*make_rows(1000)).wait(DEADLINE_S)
    lost = next(info for info in describe_pool(pool) if info.leads)
    actor = ray.get_actor(pool.actor_name(lost.shard, lost.replica), namespace=pool.ray_namespace)
    shutil.rmtree(lost.path)
    ray.kill(actor)  # for good: the other one leads now, and makes it anew
    client.save(*make_rows(500, 1000)).wait(DEADLINE_S)
    infos = await_infos(pool, all_members)
    anew = next(i for i in infos if (i.shard, i.replica) == (lost.shard, lost.replica))
    assert anew.pid != lost.pid
    assert anew.generation != lost.generation
    assert not anew.leads
    assert_replicas_equal(pool, 1500)


def test_a_leader_makes_no_peer_anew_while_its_shard_stops(pool: PoolInfo) -> None:
    for info in describe_pool(pool):
        if info.leads:
            os.kill(info.pid, signal.SIGKILL)
    stop_pool(pool)
    assert not any(is_registered(pool, s, r) for s in range(2) for r in range(2))


def test_a_former_leader_is_refused(pool: PoolInfo, clients: ExitStack) -> None:
    client = clients.enter_context(MemoryClient(pool, NAMESPACE))
    client.save(*make_rows(100)).wait(DEADLINE_S)
    record = LeaderLink(pool, 0).record
    now = record.current()
    assert record.change(now, tuple(reversed(now.members)))
    assert not record.change(now, now.members)  # somebody else was first
    await_infos(pool, lambda infos: infos[now.replicas[1]].leads)
    user_ids, rows = make_rows(NUM_USERS)
    mine = pool.placement.shard_of_users(user_ids) == 0
    assert now.leader is not None
    link = ShardLink(pool, 0, now.leader)
    with pytest.raises(MemoryUnavailable, match="lead"):
        link.call("save", NAMESPACE, user_ids[mine], rows[mine], timeout_s=DEADLINE_S)
    client.save(*make_rows(500)).wait(DEADLINE_S)
    assert_replicas_equal(pool, 500)


def test_buckets_move_with_their_replicas(pool: PoolInfo, clients: ExitStack) -> None:
    client = clients.enter_context(MemoryClient(pool, NAMESPACE))
    client.save(*make_rows(1000)).wait(DEADLINE_S)
    rebalance(pool, 3)
    client.save(*make_rows(1000, 1000)).wait(DEADLINE_S)
    assert len(describe_pool(pool)) == 6
    assert_replicas_equal(pool, 2000)
