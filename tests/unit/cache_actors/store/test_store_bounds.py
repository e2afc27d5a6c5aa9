"""Byte budgets, quotas, and the order in which users are evicted."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from stored_rows import ALL, OpenStore, are_proven, proven_rows, series

from cache_actors.store.errors import MemoryFullError
from cache_actors.store.limits import StoreLimits
from cache_actors.store.lookup import UserState
from cache_actors.store.mapped_shard import MappedShard
from cache_actors.store.shard_store import COLD_MARK, ShardStore
from marm.memory import Namespace, UserRows

NAMESPACE = Namespace(depth=4, dim=64)
SMALL = Namespace()
MIB = 1 << 20
BUDGET = 8 * MIB
ROWS_PER_USER = 50


def directory_bytes(directory: Path) -> int:
    """Bytes on the disk; LMDB's table of readers is of fixed size."""
    return sum(
        path.stat().st_blocks * 512 for path in directory.iterdir() if path.name != "lock.mdb"
    )


def save_user(store: ShardStore, user: int, namespace: Namespace = NAMESPACE) -> None:
    times = np.arange(ROWS_PER_USER) + user
    users = np.full(ROWS_PER_USER, user)
    store.save(namespace, users, proven_rows(namespace, users, times))


def found_users(store: ShardStore, users: np.ndarray) -> set[int]:
    state = store.open(NAMESPACE).lookup(users, 0).state
    return set(users[state == UserState.FOUND].tolist())


def test_the_budget_holds_however_much_is_saved(open_store: OpenStore) -> None:
    store = open_store(limits=StoreLimits(max_bytes=BUDGET))
    for user in range(900):  # 25 MB
        save_user(store, user)
        assert directory_bytes(store.directory) <= BUDGET
    held = store.open(NAMESPACE)
    users = np.arange(900)
    found = held.lookup(users, ALL)
    counts = found.rows.counts
    assert set(counts[found.state == UserState.FOUND].tolist()) == {ROWS_PER_USER}
    assert set(counts[found.state == UserState.EVICTED].tolist()) == {0}
    assert are_proven(NAMESPACE, found.rows)
    stats = held.stats()
    num_found = int((found.state == UserState.FOUND).sum())
    assert stats.users == num_found
    assert stats.rows == num_found * ROWS_PER_USER
    assert stats.counters.evicted_users == 900 - num_found
    assert stats.counters.evictions == 900 - num_found
    # The budget is used, not only kept.
    assert stats.rows * NAMESPACE.row_dtype.itemsize > 0.6 * BUDGET
    assert store.stats().file_bytes <= BUDGET


def test_the_budget_holds_over_many_openings(open_store: OpenStore) -> None:
    limits = StoreLimits(max_bytes=BUDGET)
    most = 0
    for opening in range(8):
        store = open_store(limits=limits)
        for user in range(opening * 150, opening * 150 + 150):
            save_user(store, user)
        assert directory_bytes(store.directory) <= BUDGET
        most = max(most, store.open(NAMESPACE).stats().rows)
        assert store.open(NAMESPACE).stats().rows > 0.6 * most
        store.close()


def test_a_full_store_whose_users_are_gone_takes_new_ones(open_store: OpenStore) -> None:
    limits = StoreLimits(max_bytes=BUDGET)
    store = open_store(limits=limits)
    for user in range(300):
        save_user(store, user)
    store.evict(NAMESPACE, np.arange(300))
    assert store.open(NAMESPACE).stats().rows == 0
    store.close()
    store = open_store(limits=limits)  # nothing in the index speaks of the file's places now
    for user in range(1000, 1150):
        save_user(store, user)
    assert len(found_users(store, np.arange(1000, 1150))) == 150
    assert directory_bytes(store.directory) <= BUDGET


def test_late_and_growing_histories_stay_within_the_budget(open_store: OpenStore) -> None:
    store = open_store(limits=StoreLimits(max_bytes=4 * MIB, max_rows_per_user=300))
    rng = np.random.default_rng(1)
    for _ in range(150):
        users = rng.integers(0, 60, 120)
        times = rng.integers(0, 10**6, 120)
        store.save(NAMESPACE, users, proven_rows(NAMESPACE, users, times))
        assert directory_bytes(store.directory) <= 4 * MIB
    found = store.open(NAMESPACE).lookup(np.arange(60), ALL)
    assert are_proven(NAMESPACE, found.rows)
    assert store.open(NAMESPACE).stats().rows == len(found.rows.rows)


def read_until(directory: Path, stop: Path) -> tuple[int, bool]:
    """Read random users until a file appears; how often, and whether every row proved itself."""
    shard = MappedShard(directory)
    held = shard.open(NAMESPACE)
    rng = np.random.default_rng(3)
    reads, proven = 0, True
    while not stop.exists() or not reads:
        users = np.unique(rng.integers(0, 900, 40))
        found = held.lookup(users, ALL)
        proven = proven and are_proven(NAMESPACE, found.rows)
        proven = proven and not (found.state == UserState.DAMAGED).any()
        reads += 1
    shard.close()
    return reads, proven


def test_readers_see_only_whole_rows_while_users_are_evicted(
    open_store: OpenStore, other_process: ProcessPoolExecutor
) -> None:
    store = open_store(limits=StoreLimits(max_bytes=BUDGET))
    save_user(store, 0)
    stop = store.directory / "stop"
    stop.touch()
    other_process.submit(read_until, store.directory, stop).result(60)  # it has started
    stop.unlink()
    reading = other_process.submit(read_until, store.directory, stop)
    try:
        for user in range(1500):
            save_user(store, user % 900)
            assert directory_bytes(store.directory) <= BUDGET
    finally:
        stop.touch()
    _, proven = reading.result(60)
    assert proven


def test_the_least_recently_used_users_go_first(open_store: OpenStore) -> None:
    store = open_store(limits=StoreLimits(max_bytes=BUDGET))
    user = 0
    while store.open(NAMESPACE).stats().counters.evictions == 0:
        save_user(store, user)
        user += 1
    first = found_users(store, np.arange(user))
    assert first == set(range(min(first), user))  # the oldest ones went
    coldest = sorted(first)
    touched = coldest[:30]
    store.touch(NAMESPACE, [*touched, 10**9])
    evictions = store.open(NAMESPACE).stats().counters.evictions
    new = 10_000
    while store.open(NAMESPACE).stats().counters.evictions == evictions:
        save_user(store, new)
        new += 1
    left = found_users(store, np.arange(user))
    assert set(touched) <= left
    gone = first - left
    untouched = coldest[30:]
    assert gone == set(untouched[: len(gone)])
    assert gone


def test_the_order_of_eviction_outlives_the_process(open_store: OpenStore) -> None:
    limits = StoreLimits(max_bytes=BUDGET)
    store = open_store(limits=limits)
    now = time.time()
    with pytest.MonkeyPatch.context() as patch:
        for user in range(100):
            patch.setattr(time, "time", lambda user=user: now - (user * 37) % 100)
            save_user(store, user)
    store.close()
    store = open_store(limits=limits)
    expected = sorted(range(100), key=lambda user: -((user * 37) % 100))
    assert store.open(NAMESPACE).recency.coldest(100) == expected


def test_each_namespace_keeps_its_quota(open_store: OpenStore) -> None:
    other = Namespace(depth=4, dim=64, epoch=1)
    quotas = ((NAMESPACE.name, 4 * MIB), (other.name, 6 * MIB))
    store = open_store(limits=StoreLimits(max_bytes=16 * MIB, namespace_bytes=quotas))
    for user in range(400):
        save_user(store, user, NAMESPACE)
        save_user(store, user, other)
    for namespace, quota in ((NAMESPACE, 4 * MIB), (other, 6 * MIB)):
        stats = store.open(namespace).stats()
        assert stats.file_bytes <= quota
        assert stats.file_bytes > 0.9 * quota
        assert stats.counters.evictions > 0
    assert directory_bytes(store.directory) <= 16 * MIB


def test_a_namespace_without_users_to_evict_says_that_there_is_no_room(
    open_store: OpenStore,
) -> None:
    store = open_store(limits=StoreLimits(max_bytes=4 * MIB))
    for user in range(100):
        save_user(store, user)
    before = store.open(NAMESPACE).stats()
    with pytest.raises(MemoryFullError, match=r"rows of .* are more than the .* that fit"):
        save_user(store, 1, SMALL)
    assert store.open(NAMESPACE).stats() == before
    store.drop(NAMESPACE)
    save_user(store, 1, SMALL)


class Tier:
    """Takes users before they are evicted, unless it is down."""

    def __init__(self) -> None:
        self.rows: dict[int, bytes] = {}
        self.is_down = False

    def put(self, namespace: Namespace, rows: UserRows) -> None:
        assert namespace == NAMESPACE
        if self.is_down:
            raise ConnectionError("the tier is down")
        for index, user in enumerate(rows.user_ids.tolist()):
            self.rows[user] = rows.of(index).tobytes()


@pytest.fixture
def tier() -> Tier:
    return Tier()


@pytest.fixture
def tiered(open_store: OpenStore, tier: Tier) -> ShardStore:
    store = open_store(limits=StoreLimits(max_bytes=BUDGET))
    store.track_unsaved, store.evict_to = True, tier.put
    return store


def test_a_tier_takes_what_it_does_not_have_before_it_is_evicted(
    tiered: ShardStore, tier: Tier
) -> None:
    for user in range(400):
        save_user(tiered, user)
    gone = set(range(400)) - found_users(tiered, np.arange(400))
    assert gone == set(tier.rows)
    for user in gone:
        times = np.arange(ROWS_PER_USER) + user
        expected = proven_rows(NAMESPACE, np.full(ROWS_PER_USER, user), times)
        assert tier.rows[user] == expected.tobytes()
    counters = tiered.open(NAMESPACE).stats().counters
    assert counters.evictions == len(gone)
    assert counters.evicted_unsaved == 0


def test_users_whom_the_tier_has_are_not_sent_again(tiered: ShardStore, tier: Tier) -> None:
    for user in range(150):
        save_user(tiered, user)
    held = tiered.open(NAMESPACE)
    waiting = held.unsaved(1000)
    tiered.mark_saved(NAMESPACE, waiting.rows.user_ids, waiting.versions)
    for user in range(1000, 1100):
        save_user(tiered, user)
    assert not tier.rows
    assert held.stats().counters.evictions > 0


def test_while_the_tier_is_down_users_it_has_go_first(tiered: ShardStore, tier: Tier) -> None:
    for user in range(150):
        save_user(tiered, user)
    held = tiered.open(NAMESPACE)
    waiting = held.unsaved(1000)
    even = waiting.rows.user_ids % 2 == 0
    tiered.mark_saved(NAMESPACE, waiting.rows.user_ids[even], waiting.versions[even])
    tier.is_down = True
    while not held.stats().counters.evictions:
        save_user(tiered, 1000)
        for user in range(1000, 1060):
            save_user(tiered, user)
    gone = set(range(150)) - found_users(tiered, np.arange(150))
    assert gone
    assert all(user % 2 == 0 for user in gone)
    assert held.stats().counters.evicted_unsaved == 0


def test_when_only_unsaved_users_are_left_they_go_and_are_counted(
    tiered: ShardStore, tier: Tier
) -> None:
    tier.is_down = True
    for user in range(400):
        save_user(tiered, user)
    held = tiered.open(NAMESPACE)
    users = np.arange(400)
    gone = 400 - len(found_users(tiered, users))
    counters = held.stats().counters
    assert counters.evictions == counters.evicted_unsaved == gone > 0
    assert set(held.lookup(users, 0).state.tolist()) == {UserState.FOUND, UserState.EVICTED}
    assert directory_bytes(tiered.directory) <= BUDGET


def test_a_lower_limit_of_rows_hides_the_others(open_store: OpenStore) -> None:
    users, rows = series(NAMESPACE, 3, 200)
    store = open_store()
    store.save(NAMESPACE, users, rows)
    store.close()
    store = open_store(limits=StoreLimits(max_rows_per_user=7))
    assert store.open(NAMESPACE).fetch(np.arange(3), ALL).counts.tolist() == [7, 7, 7]
    for start in range(10):
        store.save(NAMESPACE, *series(NAMESPACE, 3, 40, start_ms=10**6 + start * 120))
    chunk = store.open(NAMESPACE).allocator.chunk_rows
    assert store.open(NAMESPACE).stats().rows <= 3 * (7 + 2 * chunk)  # whole extents go


def test_the_budget_holds_with_very_many_small_users(open_store: OpenStore) -> None:
    """Records of evicted users take room too: they are forgotten before they take too much."""
    store = open_store(limits=StoreLimits(max_bytes=BUDGET))
    store.track_unsaved = True
    for first in range(0, 100_000, 1_000):
        users = np.arange(first, first + 1_000)
        store.save(SMALL, users, proven_rows(SMALL, users, np.zeros(1_000, np.int64)))
    assert directory_bytes(store.directory) <= BUDGET * 1.05
    assert (store.directory / COLD_MARK).exists()
    newest = store.open(SMALL).lookup(np.arange(99_000, 100_000), 10)
    assert (newest.state == UserState.FOUND).all()
    assert are_proven(SMALL, newest.rows)
