"""The record of a shard's members: changed by one at a time, seen by all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cache_actors.pool.replica_set import Member, ReplicaRecord, ReplicaSet

FIRST, SECOND = Member(0, "a"), Member(1, "b")


def test_a_new_shard_has_no_members(tmp_path: Path) -> None:
    now = ReplicaRecord(tmp_path / "replicas").current()
    assert (now.version, now.members, now.leader) == (0, (), None)
    assert now.generation_of(0) is None


def test_a_change_is_seen_by_all(tmp_path: Path) -> None:
    mine, theirs = ReplicaRecord(tmp_path), ReplicaRecord(tmp_path)
    assert mine.change(mine.current(), (FIRST, SECOND))
    seen = theirs.current()
    assert seen == ReplicaSet(1, (FIRST, SECOND)) == mine.recent()
    assert (seen.leader, seen.replicas) == (0, (0, 1))
    assert (seen.generation_of(1), seen.without(0)) == ("b", (SECOND,))


def test_of_two_changes_the_second_is_refused(tmp_path: Path) -> None:
    mine, theirs = ReplicaRecord(tmp_path), ReplicaRecord(tmp_path)
    now = mine.current()
    assert mine.change(now, (FIRST,))
    assert not theirs.change(now, (SECOND,))
    assert theirs.current().members == (FIRST,)


def test_one_of_many_changes_at_once_succeeds_each_time(tmp_path: Path) -> None:
    def change(number: int) -> int:
        record = ReplicaRecord(tmp_path)
        return sum(
            record.change(record.current(), (Member(number, str(round_)),)) for round_ in range(20)
        )

    with ThreadPoolExecutor(8) as pool:
        changes = sum(pool.map(change, range(8)))
    assert ReplicaRecord(tmp_path).current().version == changes
    assert len(list(tmp_path.glob("v*.json"))) <= 40
    assert list(tmp_path.glob(".pending*")) == []


def test_a_shard_without_members_is_refused(tmp_path: Path) -> None:
    record = ReplicaRecord(tmp_path)
    with pytest.raises(ValueError, match="at least one member"):
        record.change(record.current(), ())
