"""Replicas and moving buckets without Ray: real stores whose peers are called directly."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from cache_actors.pool import replica_set, shard_core
from cache_actors.pool.changes import Change, UsersForgotten
from cache_actors.pool.errors import HandoverLostError, MemoryUnavailable, NotLeaderError
from cache_actors.pool.replica_set import Member, ReplicaRecord
from cache_actors.pool.shard_core import ShardCore, take_lead
from cache_actors.pool.shard_duties import enter
from cache_actors.store.lookup import UserState
from cache_actors.store.namespace_writer import BucketMovedError
from cache_actors.store.shard_store import ShardStore
from marm.addressing import NUM_BUCKETS, user_bucket
from marm.memory import Namespace, UserRows

NAMESPACE = Namespace(dim=8)
USERS = np.arange(50)


def make_rows(step: int, num_rows: int = 200) -> tuple[np.ndarray, np.ndarray]:
    rows = np.zeros(num_rows, NAMESPACE.row_dtype)
    rows["timestamp_ms"] = rows["event_key"] = np.arange(num_rows)
    rows["written_step"] = step
    return np.arange(num_rows) % len(USERS), rows


@dataclass
class Pool:
    """Replicas by (shard, replica); those that are ``down`` answer nobody."""

    home: Path
    cores: dict[tuple[int, int], ShardCore] = field(default_factory=dict)
    down: set[tuple[int, int]] = field(default_factory=set)
    recalled: list[int] = field(default_factory=list)

    def start(self, shard: int, replica: int, owns: bool = True) -> ShardCore:
        owned = np.full(NUM_BUCKETS, owns)
        store = ShardStore(self.home / f"{shard}-{replica}", owned=owned)
        core = ShardCore(
            shard,
            replica,
            store,
            lambda other: ReplicaRecord(self.home / f"record-{other}"),
            lambda to, number: _Peer(self, (to, number)),
            lambda namespace, user_ids: self.recalled.extend(user_ids.tolist()),
        )
        self.cores[shard, replica] = core
        enter(core)
        return core

    def join(self, leader: ShardCore, core: ShardCore) -> None:
        number = leader.begin_join(core.replica)
        while not leader.copy_next(number).is_done:
            pass
        leader.finish_join(number, core.store.generation)
        core.record.current()


@dataclass(frozen=True)
class _Peer:
    pool: Pool
    at: tuple[int, int]

    def receive(self, change: Change, *, as_member: bool) -> None:
        self._core().receive(change, as_member=as_member)

    def rows_of(self, namespace: Namespace, user_ids: np.ndarray) -> UserRows:
        return self._core().store.open(namespace).fetch(user_ids, 1000)

    def _core(self) -> ShardCore:
        if self.at in self.pool.down:
            raise MemoryUnavailable(f"{self.at} is down")
        return self.pool.cores[self.at]


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    monkeypatch.setattr(shard_core, "READER_LEASE_S", 0.0)  # there are no readers
    started = Pool(tmp_path)
    yield started
    for core in started.cores.values():
        core.store.close()


@pytest.fixture
def readers_rely_on_records(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_core, "READER_LEASE_S", replica_set.READER_LEASE_S)


def content(core: ShardCore) -> bytes:
    found = core.store.open(NAMESPACE).fetch(USERS, 1000)
    return found.offsets.tobytes() + found.rows.tobytes()


def test_the_first_replica_leads_and_others_have_to_join(pool: Pool) -> None:
    first, second = pool.start(0, 0), pool.start(0, 1)
    assert (first.leads, second.is_member) == (True, False)
    first.save(NAMESPACE, *make_rows(1))
    with pytest.raises(NotLeaderError):
        second.save(NAMESPACE, *make_rows(1))
    with pytest.raises(NotLeaderError, match="catching up"):
        second.check_member()
    pool.join(first, second)
    assert (second.is_member, second.leads) == (True, False)
    first.save(NAMESPACE, *make_rows(2, 300))
    first.commit(UsersForgotten({7: 100}))
    assert content(first) == content(second)
    assert second.store.forgotten() == {7: 100}


def test_a_member_that_does_not_answer_is_one_no_longer(pool: Pool) -> None:
    first, second = pool.start(0, 0), pool.start(0, 1)
    pool.join(first, second)
    pool.down.add((0, 1))
    first.save(NAMESPACE, *make_rows(1))
    assert first.record.current().replicas == (0,)
    second.record.current()
    assert not second.is_member
    take_lead(second, second.record.current())
    assert not second.leads
    pool.down.clear()
    pool.join(first, second)
    assert content(first) == content(second)


def test_a_leader_that_was_replaced_acknowledges_nothing(pool: Pool) -> None:
    first, second = pool.start(0, 0), pool.start(0, 1)
    pool.join(first, second)
    take_lead(second, second.record.current())
    assert second.leads
    with pytest.raises(NotLeaderError):  # it does not know yet, but its peer does
        first.save(NAMESPACE, *make_rows(1))
    second.save(NAMESPACE, *make_rows(2))
    first.record.current()
    pool.join(second, first)
    assert content(first) == content(second)


@pytest.mark.usefixtures("readers_rely_on_records")
def test_a_new_leader_acknowledges_nothing_while_the_former_one_is_read(pool: Pool) -> None:
    first, second = pool.start(0, 0), pool.start(0, 1)
    pool.join(first, second)
    pool.down.add((0, 0))
    reader = ReplicaRecord(pool.home / "record-0")
    assert reader.current().replicas == (0, 1)
    take_lead(second, second.record.current())
    second.save(NAMESPACE, *make_rows(1))
    assert reader.recent().replicas == (1,)


@pytest.mark.usefixtures("readers_rely_on_records")
def test_a_leader_that_was_restarted_waits_for_readers_too(pool: Pool) -> None:
    first, second = pool.start(0, 0), pool.start(0, 1)
    pool.join(first, second)
    pool.down.add((0, 0))
    reader = ReplicaRecord(pool.home / "record-0")
    assert reader.current().replicas == (0, 1)
    take_lead(second, second.record.current())
    second.store.close()
    second = pool.start(0, 1)
    second.save(NAMESPACE, *make_rows(1))
    assert reader.recent().replicas == (1,)


@pytest.mark.usefixtures("readers_rely_on_records")
def test_nothing_is_acknowledged_while_a_member_that_is_out_is_read(pool: Pool) -> None:
    first, second = pool.start(0, 0), pool.start(0, 1)
    pool.join(first, second)
    pool.down.add((0, 1))
    reader = ReplicaRecord(pool.home / "record-0")
    assert reader.current().replicas == (0, 1)
    first.save(NAMESPACE, *make_rows(1))
    assert reader.recent().replicas == (0,)


@pytest.mark.usefixtures("readers_rely_on_records")
def test_nothing_is_acknowledged_while_a_store_that_was_lost_is_read(pool: Pool) -> None:
    first, second = pool.start(0, 0), pool.start(0, 1)
    pool.join(first, second)
    second.store.close()
    shutil.rmtree(pool.home / "0-1")
    reader = ReplicaRecord(pool.home / "record-0")
    assert reader.current().replicas == (0, 1)
    pool.start(0, 1)
    first.save(NAMESPACE, *make_rows(1))
    assert reader.recent().replicas == (0,)


def test_a_store_that_was_replaced_is_no_member(pool: Pool) -> None:
    first, second = pool.start(0, 0), pool.start(0, 1)
    pool.join(first, second)
    first.save(NAMESPACE, *make_rows(1))
    record = first.record
    assert record.change(
        record.current(), (Member(0, "another store"), Member(1, second.store.generation))
    )
    enter(first)
    second.record.current()
    assert (first.is_member, second.leads) == (False, True)


def test_saves_during_a_move_reach_the_new_owner(pool: Pool) -> None:
    source, target = pool.start(0, 0), pool.start(1, 0, owns=False)
    source.save(NAMESPACE, *make_rows(1))
    source.commit(UsersForgotten({7: 100}))
    bucket = int(user_bucket(7)[0])
    number = source.begin_move([bucket], 1)
    source.save(NAMESPACE, *make_rows(2, 300))
    while not source.copy_next(number).is_done:
        source.save(NAMESPACE, *make_rows(3, 400))
    expected = source.store.open(NAMESPACE).fetch(USERS, 1000)
    source.finish_move(number)
    mine = user_bucket(USERS) == bucket
    found = target.store.open(NAMESPACE).fetch(USERS, 1000)
    assert found.counts[mine].tolist() == expected.counts[mine].tolist()
    for index in np.flatnonzero(mine):
        assert found.of(index).tobytes() == expected.of(index).tobytes()
    with pytest.raises(BucketMovedError):
        source.save(NAMESPACE, *make_rows(4))
    user_ids, rows = make_rows(4)
    kept = user_bucket(user_ids) == bucket
    target.save(NAMESPACE, user_ids[kept], rows[kept])
    assert (
        target.store.open(NAMESPACE).fetch(np.array([7]), 1000).rows["timestamp_ms"] > 100
    ).all()


def test_a_move_whose_target_fails_does_not_stop_saves(pool: Pool) -> None:
    source, target = pool.start(0, 0), pool.start(1, 0, owns=False)
    source.save(NAMESPACE, *make_rows(1))
    bucket = int(user_bucket(7)[0])
    number = source.begin_move([bucket], 1)
    pool.down.add((1, 0))
    source.save(NAMESPACE, *make_rows(2))
    with pytest.raises(HandoverLostError, match="begin again"):
        source.copy_next(number)
    with pytest.raises(MemoryUnavailable):
        source.begin_move([bucket], 1)
    pool.down.clear()
    number = source.begin_move([bucket], 1)
    with pytest.raises(HandoverLostError, match="not finished"):
        source.finish_move(number)
    while not source.copy_next(number).is_done:
        pass
    source.finish_move(number)
    found = target.store.open(NAMESPACE).fetch(np.array([7]), 1000)
    assert set(found.rows["written_step"].tolist()) == {2}
    assert not source.store.owned()[bucket]


def test_several_buckets_move_at_once_and_damaged_users_are_asked_for(pool: Pool) -> None:
    source, target = pool.start(0, 0), pool.start(1, 0, owns=False)
    source.save(NAMESPACE, *make_rows(1))
    (path,) = (pool.home / "0-0").glob("*.rows")
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 8)
    damaged = USERS[source.store.open(NAMESPACE).lookup(USERS, 1000).state == UserState.DAMAGED]
    assert len(damaged) == 1
    buckets = np.unique(user_bucket(USERS)).tolist()
    with pytest.raises(BucketMovedError, match="does not own all"):
        target.begin_move(buckets, 0)
    number = source.begin_move(buckets, 1)
    while not source.copy_next(number).is_done:
        pass
    source.finish_move(number)
    assert not source.store.owned()[buckets].any()
    assert pool.recalled == damaged.tolist()  # what is missing is in the durable tier, if anywhere
    found = target.store.open(NAMESPACE).fetch(USERS, 1000)
    assert (found.counts == np.where(damaged[0] == USERS, 3, 4)).all()


def test_a_damaged_row_comes_back_from_the_other_member(pool: Pool) -> None:
    first, second = pool.start(0, 0), pool.start(0, 1)
    pool.join(first, second)
    first.save(NAMESPACE, *make_rows(1))
    expected = content(first)
    (path,) = (pool.home / "0-0").glob("*.rows")
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 8)
    assert content(first) != expected
    first.repair(NAMESPACE, USERS)
    assert content(first) == expected
