"""Flipped bytes in rows, in their checks and in the index: never returned, found, and dropped."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import lmdb
import numpy as np
import pytest
from stored_rows import ALL, OpenStore, are_proven, as_user_rows, proven_rows

from cache_actors.store.lookup import Lookup, UserState
from cache_actors.store.mapped_shard import MappedShard
from cache_actors.store.records import HEAD_WORDS, extent_start, record_key, record_words
from cache_actors.store.shard_store import ShardStore
from marm.addressing import NUM_BUCKETS
from marm.memory import Namespace

NAMESPACE = Namespace()
NUM_USERS, PER_USER = 12, 300
USERS = np.arange(NUM_USERS)
FOUND, EVICTED, DAMAGED = UserState.FOUND, UserState.EVICTED, UserState.DAMAGED
TIMES = np.arange(PER_USER) * 10


def user_rows(user: int, times: np.ndarray = TIMES) -> np.ndarray:
    return proven_rows(NAMESPACE, np.full(len(times), user), times)


@pytest.fixture
def store(open_store: OpenStore) -> ShardStore:
    store = open_store()
    for user in USERS.tolist():
        store.save(NAMESPACE, np.full(PER_USER, user), user_rows(user))
    return store


def place_of(store: ShardStore, user: int, index: int) -> int:
    """Where a user's row is in the row file."""
    value = store._env.read(lambda t: bytes(t.get(record_key(user), db=table(store))))
    words = record_words(value, user)
    assert words is not None
    for word in words[HEAD_WORDS:]:
        count = word & 0xFFFF
        if index < count:
            return extent_start(word) + index
        index -= count
    raise AssertionError("no such row")


def table(store: ShardStore) -> object:
    return store._env.table(b"index/" + NAMESPACE.name.encode())


def flip(path: Path, position: int, bit: int = 3) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (value,) = file.read(1)
        file.seek(position)
        file.write(bytes([value ^ 1 << bit]))


def damage_row(store: ShardStore, user: int, index: int, byte: int = 70, bit: int = 3) -> None:
    (path,) = store.directory.glob(f"{NAMESPACE.name}-*.rows")
    width = NAMESPACE.stored_dtype.itemsize
    flip(path, place_of(store, user, index) * width + byte, bit)


def damage_time(store: ShardStore, user: int, index: int, bit: int) -> None:
    damage_row(store, user, index, 16 + bit // 8, bit % 8)  # timestamp_ms lies at 16..24


def damage_check(store: ShardStore, user: int, index: int) -> None:
    (path,) = store.directory.glob(f"{NAMESPACE.name}-*.checks")
    flip(path, place_of(store, user, index) * 8 + 5)


def damage_record(store: ShardStore, user: int, byte: int = 20) -> None:
    def change(transaction: lmdb.Transaction) -> None:
        value = bytearray(transaction.get(record_key(user), db=table(store)))
        value[byte] ^= 8
        transaction.put(record_key(user), bytes(value), db=table(store))

    store._env.write(change)


def check_lookup(found: Lookup, expected_times: dict[int, list[int]]) -> None:
    assert are_proven(NAMESPACE, found.rows)
    for index, user in enumerate(found.rows.user_ids.tolist()):
        times = found.rows.of(index)["timestamp_ms"].tolist()
        assert times == expected_times.get(user, TIMES.tolist())


def lookup_every_way(store: ShardStore, n: int, before: int | None = None) -> Lookup:
    """All users together; one by one they must give the same."""
    held = store.open(NAMESPACE)
    times = None if before is None else np.full(NUM_USERS, before)
    together = held.lookup(USERS, n, times)
    for index in range(NUM_USERS):
        mine = slice(index, index + 1)
        alone = held.lookup(USERS[mine], n, None if times is None else times[mine])
        assert alone.state[0] == together.state[index]
        assert alone.rows.rows.tobytes() == together.rows.of(index).tobytes()
    return together


@pytest.mark.parametrize("index", [0, 127, 128, 150, PER_USER - 1])
def test_a_damaged_row_is_left_out_and_repaired(store: ShardStore, index: int) -> None:
    damage_row(store, 4, index)
    left = [time for time in TIMES.tolist() if time != index * 10]
    found = lookup_every_way(store, ALL)
    check_lookup(found, {4: left})
    assert found.state.tolist() == [DAMAGED if user == 4 else FOUND for user in range(NUM_USERS)]
    out = np.zeros(PER_USER, NAMESPACE.row_dtype)
    assert store.open(NAMESPACE).fetch_into(4, PER_USER, out) == 0
    assert store.open(NAMESPACE).fetch_into(5, PER_USER, out) == PER_USER
    dropped = sum(store.verify(NAMESPACE, bucket) for bucket in range(NUM_BUCKETS))
    assert dropped == 1
    found = lookup_every_way(store, ALL)
    check_lookup(found, {4: left})
    assert found.state.tolist() == [EVICTED if user == 4 else FOUND for user in range(NUM_USERS)]
    stats = store.open(NAMESPACE).stats()
    assert (stats.rows, stats.counters.damaged_rows) == (NUM_USERS * PER_USER - 1, 1)
    assert (stats.users, stats.counters.evicted_users) == (NUM_USERS, 1)
    assert sum(store.verify(NAMESPACE, bucket) for bucket in range(NUM_BUCKETS)) == 0
    store.restore(NAMESPACE, as_user_rows(4, user_rows(4)))
    found = lookup_every_way(store, ALL)
    check_lookup(found, {})
    assert set(found.state.tolist()) == {FOUND}


@pytest.mark.parametrize("index", [0, 1, 126, 127, 128, 150, PER_USER - 1])
def test_a_damaged_check_costs_two_rows_at_most_and_is_repaired(
    store: ShardStore, index: int
) -> None:
    """The checks of an extent are running sums, so one of them speaks of the row before it and of
    the one behind. Reads that begin and end elsewhere don't notice."""
    damage_check(store, 4, index)
    near = {index * 10, (index + 1) * 10}
    for n in (1, PER_USER - index - 1, PER_USER - index, ALL):
        for before in (None, index * 10, index * 10 + 1, index * 10 + 21):
            found = lookup_every_way(store, n, before)
            assert are_proven(NAMESPACE, found.rows)
            times = found.rows.of(4)["timestamp_ms"].tolist()
            asked = [time for time in TIMES.tolist() if before is None or time < before]
            asked = asked[-n:] if n else []
            assert times == asked or found.state[4] == DAMAGED
            if before is None or before > index * 10 + 10:  # else a border can't be told
                assert set(asked) - set(times) <= near
    assert store.repair(NAMESPACE, np.array([4])) in (1, 2)
    found = lookup_every_way(store, ALL)
    assert set(TIMES.tolist()) - set(found.rows.of(4)["timestamp_ms"].tolist()) <= near
    assert found.state[4] == EVICTED
    store.restore(NAMESPACE, as_user_rows(4, user_rows(4)))
    check_lookup(lookup_every_way(store, ALL), {})


def test_rows_saved_behind_a_damaged_check_are_sound(store: ShardStore) -> None:
    damage_check(store, 4, PER_USER - 1)
    store.save(NAMESPACE, np.array([4, 4]), user_rows(4, np.array([5000, 5010])))
    found = lookup_every_way(store, ALL)
    check_lookup(found, {4: [time for time in TIMES.tolist() if time != 2990] + [5000, 5010]})
    assert store.repair(NAMESPACE, np.array([4])) == 1
    found = lookup_every_way(store, ALL)
    check_lookup(found, {4: [time for time in TIMES.tolist() if time != 2990] + [5000, 5010]})


def test_every_byte_of_a_row_is_under_its_check(store: ShardStore) -> None:
    for byte in range(NAMESPACE.stored_dtype.itemsize):
        damage_row(store, 2, 9, byte)
        found = store.open(NAMESPACE).lookup(np.array([2]), ALL)
        assert found.state.tolist() == [DAMAGED]
        assert are_proven(NAMESPACE, found.rows)
        assert found.rows.counts.tolist() == [PER_USER - 1]
        damage_row(store, 2, 9, byte)  # back again
        assert store.open(NAMESPACE).lookup(np.array([2]), ALL).state.tolist() == [FOUND]


def test_a_page_of_zeros_is_damage(store: ShardStore) -> None:
    for path in store.directory.glob(f"{NAMESPACE.name}-*.*s"):
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.write(bytes(min(size, 1 << 20)))
    found = lookup_every_way(store, ALL)
    assert are_proven(NAMESPACE, found.rows)
    assert set(found.state.tolist()) == {DAMAGED}
    assert sum(store.verify(NAMESPACE, bucket) for bucket in range(NUM_BUCKETS)) > 0
    assert set(lookup_every_way(store, ALL).state.tolist()) == {EVICTED}


@pytest.mark.parametrize("bit", [9, 62, 63])
@pytest.mark.parametrize("index", [0, 63, 64, 127, 128, 192, 256, 299])
def test_a_damaged_time_never_lets_newer_rows_through(
    store: ShardStore, index: int, bit: int
) -> None:
    damage_time(store, 4, index, bit)
    for before in (0, 500, 641, 1280, 1281, 2555, 2990, 2991):
        for n in (1, ALL):
            found = lookup_every_way(store, n, before)
            assert are_proven(NAMESPACE, found.rows)
            for user in USERS.tolist():
                times = found.rows.of(user)["timestamp_ms"].tolist()
                expected = [time for time in TIMES.tolist() if time < before][-n:]
                if found.state[user] == FOUND:
                    assert times == expected
                else:
                    assert user == 4
                    assert found.state[user] == DAMAGED
                    assert set(times) <= set(expected)


@pytest.mark.parametrize("index", [0, 64, 128, 200, 256, 299])
@pytest.mark.parametrize("bit", [5, 62])
def test_rows_saved_to_a_damaged_user_keep_their_order(
    store: ShardStore, index: int, bit: int
) -> None:
    damage_time(store, 4, index, bit)
    late = np.array([5, 1285, 2005, 2995])
    for time in late.tolist():
        store.save(NAMESPACE, np.array([4]), user_rows(4, np.array([time])))
    store.repair(NAMESPACE, np.array([4]))
    found = lookup_every_way(store, ALL)
    expected = sorted({*TIMES.tolist(), *late.tolist()} - {index * 10})
    check_lookup(found, {4: expected})
    assert found.state[4] == EVICTED


@pytest.mark.parametrize("byte", [0, 8, 16, 24, 33, 40, 45, 47])
def test_a_damaged_record_gives_nothing_and_is_repaired(store: ShardStore, byte: int) -> None:
    damage_record(store, 4, byte)
    found = lookup_every_way(store, ALL)
    check_lookup(found, {4: []})
    assert found.state[4] == DAMAGED
    assert store.open(NAMESPACE).fetch_into(4, 1, np.zeros(1, NAMESPACE.row_dtype)) == 0
    store.repair(NAMESPACE, np.array([4]))
    assert lookup_every_way(store, ALL).state[4] == EVICTED
    store.restore(NAMESPACE, as_user_rows(4, user_rows(4)))
    found = lookup_every_way(store, ALL)
    check_lookup(found, {})
    assert set(found.state.tolist()) == {FOUND}


def test_a_save_to_a_damaged_record_leaves_the_user_incomplete(store: ShardStore) -> None:
    damage_record(store, 4)
    store.save(NAMESPACE, np.array([4]), user_rows(4, np.array([5000])))
    found = lookup_every_way(store, ALL)
    check_lookup(found, {4: [5000]})
    assert found.state[4] == EVICTED


def test_damaged_records_are_found_when_a_store_is_opened(
    store: ShardStore, open_store: OpenStore
) -> None:
    damage_record(store, 4)
    damage_record(store, 5, 3)
    store.close()
    store = open_store()
    found = lookup_every_way(store, ALL)
    check_lookup(found, {4: [], 5: []})
    assert found.state[[4, 5]].tolist() == [EVICTED, EVICTED]
    stats = store.open(NAMESPACE).stats()
    assert (stats.users, stats.counters.evicted_users) == (NUM_USERS - 2, 2)
    assert stats.rows == (NUM_USERS - 2) * PER_USER
    # Their places are free again, and nobody else's were given away.
    for user in range(100, 110):
        store.save(NAMESPACE, np.full(PER_USER, user), user_rows(user))
    check_lookup(lookup_every_way(store, ALL), {4: [], 5: []})


def test_forgetting_does_not_make_damage_look_sound(store: ShardStore) -> None:
    damage_row(store, 4, 200)
    store.forget(4, 1000)
    found = lookup_every_way(store, ALL)
    check_lookup(found, {4: [time for time in TIMES.tolist() if time > 1000 and time != 2000]})
    damage_record(store, 5)
    store.forget(5, 10**6)
    found = lookup_every_way(store, ALL)
    assert found.rows.counts[5] == 0
    assert found.state[5] == UserState.ABSENT


def damaged_users(directory: Path) -> list[int]:
    shard = MappedShard(directory)
    found = shard.open(NAMESPACE).lookup(USERS, ALL)
    shard.close()
    assert are_proven(NAMESPACE, found.rows)
    return USERS[found.state == DAMAGED].tolist()


def test_readers_elsewhere_see_damage_too(
    store: ShardStore, other_process: ProcessPoolExecutor
) -> None:
    damage_row(store, 4, 200)
    damage_record(store, 7)
    assert other_process.submit(damaged_users, store.directory).result(60) == [4, 7]
    assert store.repair(NAMESPACE, USERS) == 1
    assert other_process.submit(damaged_users, store.directory).result(60) == []
