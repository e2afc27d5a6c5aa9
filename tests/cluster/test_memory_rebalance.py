"""Growing and shrinking a pool that is being read and written."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from event_stream import EVENT_NAMESPACE, event_rows

from cache_actors.pool.client import MemoryClient
from cache_actors.pool.lifecycle import connect_pool, describe_pool, start_pool, stop_pool
from cache_actors.pool.placement import BucketMove, PlacementError, load_placement
from cache_actors.pool.rebalance import RebalanceRunningError, rebalance
from cache_actors.pool.shard_link import PoolInfo, ShardLink
from marm.memory import InProcessMemory

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]

NAMESPACE = EVENT_NAMESPACE
NUM_USERS = 400
USERS = np.arange(NUM_USERS)
make_rows = partial(event_rows, NUM_USERS)
DEADLINE_S = 120.0


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[PoolInfo]:
    started = start_pool(tmp_path, 2)
    yield started
    stop_pool(started)


@pytest.fixture
def clients() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


class Load:
    """A writer and a reader at work. ``problems`` says what either of them met."""

    def __init__(self, writer: MemoryClient, reader: MemoryClient) -> None:
        self.acknowledged = 0
        self.problems: list[str] = []
        self._writer, self._reader = writer, reader
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._guard, args=(work,)) for work in (self._write, self._read)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)

    def _write(self) -> None:
        while not self._stop.is_set():
            acks = [
                self._writer.save(*make_rows(64, self.acknowledged + 64 * part))
                for part in range(4)
            ]
            for ack in acks:
                ack.wait(DEADLINE_S)
            self.acknowledged += 256

    def _read(self) -> None:
        while not self._stop.wait(0.01):
            promised = self.acknowledged
            keys = self._reader.fetch(USERS, 10**6).rows["event_key"]
            found = int((keys < promised).sum())
            if found != promised:
                self.problems.append(f"{promised} rows acknowledged, {found} read")

    def _guard(self, work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as error:
            self.problems.append(repr(error))
            self._stop.set()


def assert_holds(pool: PoolInfo, count: int) -> None:
    """The pool has exactly the first ``count`` rows, as a new client sees it."""
    reference = InProcessMemory(NAMESPACE)
    reference.save(*make_rows(count))
    expected = reference.fetch(USERS, 10**6)
    with MemoryClient(connect_pool(pool.home), NAMESPACE) as client:
        found = client.fetch(USERS, 10**6)
        assert client.stats().rows == count
    assert found.offsets.tolist() == expected.offsets.tolist()
    assert found.rows.tobytes() == expected.rows.tobytes()


def test_growing_and_shrinking_under_load_loses_nothing(pool: PoolInfo, clients: ExitStack) -> None:
    writer = clients.enter_context(MemoryClient(pool, NAMESPACE))
    reader = clients.enter_context(MemoryClient(pool, NAMESPACE))
    writer.save(*make_rows(4000)).wait(DEADLINE_S)
    with Load(writer, reader) as load:
        grown = rebalance(pool, 3)
        shrunk = rebalance(pool, 1)
    assert load.problems == []
    assert (grown.num_shards_before, grown.num_shards) == (2, 3)
    assert grown.buckets_moved == 85
    assert shrunk.buckets_moved == 256 - 86
    assert shrunk.rows_moved > 0
    assert len(describe_pool(pool)) == 1
    assert_holds(pool, max(load.acknowledged, 4000))
    again = start_pool(pool.home)
    assert again.placement.num_shards == 1
    with pytest.raises(PlacementError, match="marm memory rebalance --shards 2"):
        start_pool(pool.home, 2)


@pytest.mark.parametrize("killed", ["source", "target"])
def test_a_rebalance_goes_on_after_a_shard_was_killed(
    pool: PoolInfo, clients: ExitStack, killed: str
) -> None:
    writer = clients.enter_context(MemoryClient(pool, NAMESPACE))
    reader = clients.enter_context(MemoryClient(pool, NAMESPACE))
    writer.save(*make_rows(4000)).wait(DEADLINE_S)
    kills = iter([10, 40])
    next_kill = [next(kills)]
    moved: list[BucketMove] = []

    def kill(move: BucketMove) -> None:
        moved.append(move)
        if len(moved) == next_kill[0]:
            shard = move.source if killed == "source" else move.target
            os.kill(describe_pool(pool)[shard].pid, signal.SIGKILL)
            next_kill[0] = next(kills, 0)

    with Load(writer, reader) as load:
        report = rebalance(pool, 3, on_move=kill)
    assert load.problems == []
    assert report.buckets_moved == len(moved) == 85
    assert_holds(pool, max(load.acknowledged, 4000))


def test_a_rebalance_that_was_broken_off_is_finished_by_the_next(
    pool: PoolInfo, clients: ExitStack
) -> None:
    client = clients.enter_context(MemoryClient(pool, NAMESPACE))
    client.save(*make_rows(4000)).wait(DEADLINE_S)
    bucket = int(pool.placement.buckets_of(0)[0])
    # A move whose end was not written down, and one that was left half-way.
    first, second = ShardLink(pool, 0), ShardLink(pool, 1)
    number = first.call("begin_move", [bucket], 1, timeout_s=DEADLINE_S)
    while not first.call("copy_next", number, timeout_s=DEADLINE_S).is_done:
        pass
    first.call("finish_move", number, timeout_s=DEADLINE_S)
    second.call("begin_move", pool.placement.buckets_of(1)[:1].tolist(), 0, timeout_s=DEADLINE_S)
    client.save(*make_rows(4000, step=1)).wait(DEADLINE_S)
    assert set(client.fetch(USERS, 10**6).rows["written_step"].tolist()) == {1}
    rebalance(pool, 2)
    placement = load_placement(pool.placement_path)
    for shard in range(2):
        owned = ShardLink(pool, shard).call("owned", timeout_s=DEADLINE_S)
        assert np.flatnonzero(owned).tolist() == placement.buckets_of(shard).tolist()
    found = client.fetch(USERS, 10**6)
    assert len(found.rows) == 4000
    assert set(found.rows["written_step"].tolist()) == {1}


def test_forgotten_users_stay_forgotten_when_their_bucket_moves(
    pool: PoolInfo, clients: ExitStack
) -> None:
    client = clients.enter_context(MemoryClient(pool, NAMESPACE))
    client.save(*make_rows(4000)).wait(DEADLINE_S)
    user = int(USERS[pool.placement.shard_of_users(USERS) == 0][0])
    ShardLink(pool, 0).call("forget", user, 2000, timeout_s=DEADLINE_S)
    expected = client.fetch(USERS, 10**6)
    rebalance(pool, 1)
    rebalance(pool, 2)
    client.save(*make_rows(4000)).wait(DEADLINE_S)  # a replay
    found = client.fetch(USERS, 10**6)
    assert found.rows.tobytes() == expected.rows.tobytes()
    assert (found.of(user)["timestamp_ms"] > 2000).all()


def test_clients_that_did_not_look_follow_when_a_shard_is_retired(
    pool: PoolInfo, clients: ExitStack
) -> None:
    client = clients.enter_context(MemoryClient(pool, NAMESPACE, watch_interval_s=10**6))
    client.save(*make_rows(4000)).wait(DEADLINE_S)
    for reader in client._reads.readers:
        reader._node_id = "another"
        reader.close()
    rebalance(pool, 1)
    assert client._routes.placement.num_shards == 2
    assert len(client.fetch(USERS, 10**6).rows) == 4000
    late = clients.enter_context(MemoryClient(pool, NAMESPACE, watch_interval_s=10**6))
    late._routes._placement = pool.placement  # as it was
    late.save(*make_rows(4000, 4000)).wait(late._saves._deadline_s / 2)
    assert_holds(pool, 8000)


def test_only_one_rebalance_runs_at_a_time(pool: PoolInfo) -> None:
    refused: list[BaseException] = []

    def again(move: BucketMove) -> None:
        if not refused:
            with pytest.raises(RebalanceRunningError) as error:
                rebalance(pool, 2)
            refused.append(error.value)

    rebalance(pool, 3, on_move=again)
    assert len(refused) == 1
    with pytest.raises(PlacementError, match="1 to 256 shards"):
        rebalance(pool, 0)
