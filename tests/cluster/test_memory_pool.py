"""The memory pool on a real Ray: what it stores, and what it survives."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray
from event_stream import EVENT_NAMESPACE, event_rows

from cache_actors.pool.client import MemoryClient
from cache_actors.pool.config import PoolConfig, PoolConfigError
from cache_actors.pool.lifecycle import connect_pool, describe_pool, start_pool, stop_pool
from cache_actors.pool.placement import PlacementError
from cache_actors.pool.shard import MemoryShard
from cache_actors.pool.shard_actors import create_replica, is_registered
from cache_actors.pool.shard_link import MemoryUnavailable, PoolInfo, ShardLink
from cache_actors.store.errors import NamespaceMismatchError
from cache_actors.store.limits import StoreLimits
from cache_actors.store.writer_lock import WriterLock
from marm.memory import RAW_STEP, InProcessMemory, Namespace

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]

NAMESPACE = EVENT_NAMESPACE
NUM_USERS = 60
USERS = np.arange(NUM_USERS)
make_rows = partial(event_rows, NUM_USERS)
DEADLINE_S = 60.0


def as_from_another_node(client: MemoryClient) -> MemoryClient:
    """The client, made to believe that no shard is on its node."""
    for reader in client._reads.readers:
        reader._node_id = "another"
        reader.close()
    return client


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[PoolInfo]:
    started = start_pool(tmp_path, 2)
    yield started
    stop_pool(started)


@pytest.fixture
def clients(pool: PoolInfo) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def kill_shard(pool: PoolInfo, shard: int) -> int:
    pid = describe_pool(pool)[shard].pid
    os.kill(pid, signal.SIGKILL)
    return pid


def await_shards(pool: PoolInfo) -> list[int]:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            return [info.pid for info in describe_pool(pool)]
        except MemoryUnavailable:
            assert time.monotonic() < deadline


def assert_equal_fetches(client: MemoryClient, reference: InProcessMemory) -> None:
    rng = np.random.default_rng(0)
    for n, before_ms in ((5, None), (1000, None), (7, rng.integers(0, 2500, NUM_USERS + 3))):
        user_ids = rng.permutation(NUM_USERS + 3)
        found = client.fetch(user_ids, n, before_ms)
        expected = reference.fetch(user_ids, n, before_ms)
        assert found.offsets.tolist() == expected.offsets.tolist()
        assert found.rows.tobytes() == expected.rows.tobytes()


def test_the_pool_equals_a_memory_in_process(pool: PoolInfo, clients: ExitStack) -> None:
    client = clients.enter_context(MemoryClient(pool, NAMESPACE))
    distant = as_from_another_node(clients.enter_context(MemoryClient(pool, NAMESPACE)))
    reference = InProcessMemory(NAMESPACE)
    raw, computed, late = (
        make_rows(2000, step=RAW_STEP),
        make_rows(1500, step=3),
        make_rows(500, start=1800, step=4),
    )
    for user_ids, rows in (raw, computed, late):
        client.save(user_ids, rows).wait(DEADLINE_S)
        reference.save(user_ids, rows)
    assert [shard.is_local for shard in client.stats().shards] == [True, True]
    assert [shard.is_local for shard in distant.stats().shards] == [False, False]
    assert_equal_fetches(client, reference)
    assert_equal_fetches(distant, reference)


def test_stats_tell_what_is_held_and_what_was_found(pool: PoolInfo, clients: ExitStack) -> None:
    client = clients.enter_context(MemoryClient(pool, NAMESPACE))
    assert client.stats().hit_rate == 0.0
    client.save(*make_rows(300, step=RAW_STEP)).wait(DEADLINE_S)
    client.save(*make_rows(75, step=1)).wait(DEADLINE_S)
    client.fetch(USERS, 1000)
    client.fetch_available(USERS[:0], 10)
    stats = client.stats()
    assert (stats.users, stats.rows) == (NUM_USERS, 300)
    assert stats.stored_bytes > 0
    assert all(shard.held is not None and shard.held.rows > 0 for shard in stats.shards)
    assert (stats.fetched.users, stats.fetched.rows) == (NUM_USERS, 300)
    assert stats.hit_rate == 0.25


def test_a_killed_shard_loses_no_acknowledged_row(pool: PoolInfo, clients: ExitStack) -> None:
    writer = clients.enter_context(MemoryClient(pool, NAMESPACE))
    reader = clients.enter_context(MemoryClient(pool, NAMESPACE))
    acknowledged = 0
    stop = threading.Event()
    problems: list[str] = []

    def write() -> None:
        nonlocal acknowledged
        start = 0
        while not stop.is_set():
            acks = [writer.save(*make_rows(64, start + 64 * part)) for part in range(4)]
            for ack in acks:
                ack.wait(DEADLINE_S)
            start += 256
            acknowledged = start

    def read() -> None:
        while not stop.is_set():
            promised = acknowledged
            found = reader.fetch(USERS, 10**6)  # raises if any shard is unavailable
            keys = found.rows["event_key"]
            if int((keys < promised).sum()) != promised:
                problems.append(
                    f"{promised} rows acknowledged, {int((keys < promised).sum())} read"
                )

    def check(work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as error:
            problems.append(repr(error))
            stop.set()

    threads = [threading.Thread(target=check, args=(work,)) for work in (write, read)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 2 * DEADLINE_S
    for kill in range(3):
        before_kill = acknowledged
        pid = kill_shard(pool, kill % 2)
        while acknowledged < before_kill + 1024 and not stop.is_set():
            assert time.monotonic() < deadline, "the writer does not go on after a kill"
            stop.wait(0.01)
        assert pid not in await_shards(pool)
    stop.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert problems == []
    stored = as_from_another_node(clients.enter_context(MemoryClient(pool, NAMESPACE)))
    reference = InProcessMemory(NAMESPACE)
    reference.save(*make_rows(acknowledged))
    assert_equal_fetches(stored, reference)


def test_saves_of_one_user_apply_in_order_through_a_kill(
    pool: PoolInfo, clients: ExitStack
) -> None:
    client = clients.enter_context(MemoryClient(pool, NAMESPACE, max_pending_saves=3))
    user_ids, rows = make_rows(NUM_USERS)
    acks = []
    for step in range(60):
        if step == 20:
            kill_shard(pool, 0)
        rows["written_step"] = step  # the client must have taken a copy
        acks.append(client.save(user_ids, rows))
    for ack in acks:
        ack.wait(DEADLINE_S)
    assert set(client.fetch(USERS, 5).rows["written_step"].tolist()) == {59}


def test_readers_on_the_node_go_on_while_a_shard_is_down(
    pool: PoolInfo, clients: ExitStack
) -> None:
    near = clients.enter_context(MemoryClient(pool, NAMESPACE))
    distant = as_from_another_node(
        clients.enter_context(MemoryClient(pool, NAMESPACE, read_timeout_s=1.0))
    )
    near.save(*make_rows(600)).wait(DEADLINE_S)
    expected = near.fetch(USERS, 100)
    ray.kill(ray.get_actor(pool.actor_name(0), namespace=pool.ray_namespace))
    found = near.fetch(USERS, 100)
    assert found.rows.tobytes() == expected.rows.tobytes()
    in_time, late = near.fetch_available(USERS, 100, layers=0, timeout_s=0.0)  # nobody is asked
    assert not late.any()
    assert in_time.rows["event_key"].tolist() == expected.rows["event_key"].tolist()

    lost = pool.placement.shard_of_users(USERS) == 0
    assert 0 < lost.sum() < NUM_USERS
    with pytest.raises(MemoryUnavailable, match="memory shard 0"):
        distant.fetch(USERS, 100)
    rows, missing = distant.fetch_available(USERS, 100)
    assert missing.tolist() == lost.tolist()
    assert distant.fetch_available(USERS, 100, layers=0, timeout_s=0.01)[1][lost].all()
    assert rows.counts.tolist() == np.where(lost, 0, expected.counts).tolist()
    stats = distant.stats()
    assert stats.fetched.unavailable_users >= 2 * lost.sum()
    assert [shard.held is None for shard in stats.shards] == [True, False]

    start_pool(pool.home, 2)
    assert distant.fetch(USERS, 100).rows.tobytes() == expected.rows.tobytes()


def test_a_client_made_while_a_shard_is_down_reads_its_files(
    pool: PoolInfo, clients: ExitStack
) -> None:
    writer = clients.enter_context(MemoryClient(pool, NAMESPACE))
    writer.save(*make_rows(600)).wait(DEADLINE_S)
    expected = writer.fetch(USERS, 100)
    ray.kill(ray.get_actor(pool.actor_name(1), namespace=pool.ray_namespace))
    near, distant = (
        clients.enter_context(MemoryClient(pool, NAMESPACE, read_timeout_s=1.0)) for _ in range(2)
    )
    assert near.fetch(USERS, 100).rows.tobytes() == expected.rows.tobytes()
    assert all(shard.is_local for shard in near.stats().shards)
    lost = pool.placement.shard_of_users(USERS) == 1
    assert as_from_another_node(distant).fetch_available(USERS, 100)[1].tolist() == lost.tolist()
    start_pool(pool.home, 2)
    assert distant.fetch(USERS, 100).rows.tobytes() == expected.rows.tobytes()


def test_a_reader_elsewhere_waits_for_a_shard_that_restarts(
    pool: PoolInfo, clients: ExitStack
) -> None:
    distant = as_from_another_node(
        clients.enter_context(MemoryClient(pool, NAMESPACE, read_timeout_s=DEADLINE_S))
    )
    distant.save(*make_rows(600)).wait(DEADLINE_S)
    expected = distant.fetch(USERS, 100)
    kill_shard(pool, 0)
    assert distant.fetch(USERS, 100).rows.tobytes() == expected.rows.tobytes()


def test_a_save_that_cannot_be_stored_says_so(pool: PoolInfo, clients: ExitStack) -> None:
    client = clients.enter_context(MemoryClient(pool, NAMESPACE, save_deadline_s=0.5))
    stop_pool(pool)
    ack = client.save(*make_rows(64))
    with pytest.raises(MemoryUnavailable, match="gave no answer"):
        ack.wait(DEADLINE_S)
    assert not ack.done()
    start_pool(pool.home, 2)
    client.save(*make_rows(64)).wait(DEADLINE_S)
    assert client.stats().rows == 64


def test_a_pool_started_again_serves_what_was_stored(pool: PoolInfo, clients: ExitStack) -> None:
    client = clients.enter_context(MemoryClient(pool, NAMESPACE))
    client.save(*make_rows(600)).wait(DEADLINE_S)
    expected = client.fetch(USERS, 100)
    pids = [info.pid for info in describe_pool(pool)]
    stop_pool(pool)
    with pytest.raises(MemoryUnavailable, match="start it with start_pool"):
        connect_pool(pool.home)
    stop_pool(pool)  # nothing to stop is no error
    again = start_pool(pool.home, 2)
    assert not set(pids) & {info.pid for info in describe_pool(again)}
    fresh = clients.enter_context(MemoryClient(connect_pool(pool.home), NAMESPACE))
    for reader in (fresh, as_from_another_node(fresh)):
        assert reader.fetch(USERS, 100).rows.tobytes() == expected.rows.tobytes()
    client.save(*make_rows(600, start=600)).wait(DEADLINE_S)  # the old client finds the new pool
    assert fresh.stats().rows == 1200


def test_saves_that_were_joined_fit_a_small_budget(tmp_path: Path) -> None:
    wide = Namespace(depth=4, dim=128)
    limits = StoreLimits(max_bytes=8 << 20)
    pool = start_pool(tmp_path, 1, config=PoolConfig(limits=limits))
    rows = np.zeros(2048, wide.row_dtype)
    rows["event_key"] = rows["timestamp_ms"] = np.arange(len(rows))
    with MemoryClient(pool, wide) as client:
        acks = [client.save(np.arange(len(rows)) + 2048 * part, rows) for part in range(8)]
        for ack in acks:
            ack.wait(DEADLINE_S)
        last = client.fetch(np.arange(2048 * 7 + 1800, 2048 * 8), 10)
        assert last.counts.tolist() == [1] * len(last.user_ids)
    stop_pool(pool)


def test_a_shard_waits_for_the_process_that_still_writes_its_store(pool: PoolInfo) -> None:
    path = describe_pool(pool)[0].path
    stop_pool(pool)
    writer = WriterLock(path / "writer.lock")
    create_replica(MemoryShard, pool, 0, 0, frozenset())
    link = ShardLink(pool, 0)
    with pytest.raises(MemoryUnavailable, match="did not answer within"):  # it is alive
        link.call("describe", timeout_s=13.0)
    writer.release()
    assert link.call("describe", timeout_s=DEADLINE_S).path == path


def test_a_pool_stops_right_after_a_kill(pool: PoolInfo) -> None:
    for info in describe_pool(pool):
        os.kill(info.pid, signal.SIGKILL)
    stop_pool(pool)
    assert not any(is_registered(pool, shard, 0) for shard in range(2))


def test_two_starts_at_once_give_one_pool(tmp_path: Path) -> None:
    @ray.remote(num_cpus=0)
    def start(home: Path) -> tuple[PoolInfo, list[int]]:
        pool = start_pool(home, 3)
        return pool, [info.pid for info in describe_pool(pool)]

    (first, first_pids), (second, second_pids) = ray.get(
        [start.remote(tmp_path), start.remote(tmp_path)], timeout=DEADLINE_S
    )
    assert first == second
    assert first_pids == second_pids
    assert len(set(first_pids)) == 3
    stop_pool(first)


def test_a_pool_of_another_shape_is_refused(pool: PoolInfo, tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="has 2 shards, got a request for 3"):
        start_pool(pool.home, 3)
    with pytest.raises(PoolConfigError, match="stop the pool first"):
        start_pool(pool.home, config=PoolConfig(limits=StoreLimits(max_rows_per_user=10)))
    with pytest.raises(PoolConfigError, match="replicas=1, got a request for 2"):
        start_pool(pool.home, config=PoolConfig(replicas=2))
    with pytest.raises(ValueError, match="pool name"):
        start_pool(pool.home, 2, name="No Such Name")
    with pytest.raises(PlacementError, match="start the pool first"):
        connect_pool(tmp_path / "elsewhere")
    assert len(describe_pool(connect_pool(pool.home))) == 2


def test_homes_and_namespaces_do_not_mix(
    pool: PoolInfo, clients: ExitStack, tmp_path: Path
) -> None:
    client = clients.enter_context(MemoryClient(pool, NAMESPACE))
    deeper = clients.enter_context(MemoryClient(pool, Namespace(depth=3, dim=8)))
    client.save(*make_rows(60)).wait(DEADLINE_S)
    other = start_pool(tmp_path / "other", 1)
    elsewhere = clients.enter_context(MemoryClient(other, NAMESPACE))
    assert [c.stats().rows for c in (client, deeper, elsewhere)] == [60, 0, 0]
    stop_pool(other)


def test_rows_of_another_namespace_are_refused(pool: PoolInfo, clients: ExitStack) -> None:
    client = clients.enter_context(MemoryClient(pool, NAMESPACE))
    with pytest.raises(NamespaceMismatchError, match=NAMESPACE.name):
        client.save(USERS, np.zeros(NUM_USERS, Namespace().row_dtype))
    with pytest.raises(ValueError, match="one user id per row"):
        client.save(USERS[:-1], np.zeros(NUM_USERS, NAMESPACE.row_dtype))
    assert client.stats().rows == 0


def test_a_row_limit_holds_across_clients(tmp_path: Path) -> None:
    limits = StoreLimits(max_rows_per_user=10)
    pool = start_pool(tmp_path, 1, config=PoolConfig(limits=limits))
    with MemoryClient(pool, NAMESPACE) as client:
        for start in range(0, 6000, 600):
            client.save(*make_rows(600, start=start)).wait(DEADLINE_S)
        near = client.fetch(USERS, 1000)
        distant = as_from_another_node(client).fetch(USERS, 1000)
    assert near.counts.tolist() == [10] * NUM_USERS
    assert distant.rows.tobytes() == near.rows.tobytes()
    stop_pool(pool)
