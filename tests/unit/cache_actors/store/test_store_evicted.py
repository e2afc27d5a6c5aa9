"""Users whose rows are elsewhere, bringing them back, and what the durable tier still lacks."""

from __future__ import annotations

import numpy as np
import pytest
from stored_rows import ALL, OpenStore, RandomRows, as_user_rows, assert_same, proven_rows, series

from cache_actors.store.lookup import UserState
from cache_actors.store.row_formats import as_read
from cache_actors.store.shard_store import ShardStore
from marm.memory import RAW_STEP, InProcessMemory, Namespace, UserRows

NAMESPACE = Namespace()
FOUND, ABSENT, EVICTED = UserState.FOUND, UserState.ABSENT, UserState.EVICTED
USER = np.array([5])


@pytest.fixture
def store(open_store: OpenStore) -> ShardStore:
    store = open_store()
    store.track_unsaved = True
    return store


def rows_at(times: list[int], user: int = 5, step: int = 1) -> np.ndarray:
    return proven_rows(NAMESPACE, np.full(len(times), user), np.array(times, np.int64), step)


def save(store: ShardStore, times: list[int], user: int = 5, step: int = 1) -> None:
    store.save(NAMESPACE, np.full(len(times), user), rows_at(times, user, step))


def times_of(store: ShardStore, user: int = 5) -> list[int]:
    rows = store.open(NAMESPACE).fetch(np.array([user]), ALL).rows
    return rows["timestamp_ms"].tolist()


def state_of(store: ShardStore, user: int = 5) -> int:
    held = store.open(NAMESPACE)
    alone = held.lookup(np.array([user]), 0).state[0]
    together = held.lookup(np.array([user, 100, 101, 102, 103, 104]), ALL).state[0]
    assert alone == together
    return int(alone)


def test_rows_saved_after_an_eviction_are_the_newer_part(store: ShardStore) -> None:
    save(store, [1, 2, 3])
    assert store.evict(NAMESPACE, USER) == 1
    assert store.evict(NAMESPACE, USER) == 0
    assert (state_of(store), times_of(store)) == (EVICTED, [])
    save(store, [4, 5])
    assert (state_of(store), times_of(store)) == (EVICTED, [4, 5])
    save(store, [6])
    assert (state_of(store), times_of(store)) == (EVICTED, [4, 5, 6])
    out = np.zeros(9, NAMESPACE.row_dtype)
    assert store.open(NAMESPACE).fetch_into(5, 9, out) == 3
    counters = store.open(NAMESPACE).stats().counters
    assert (counters.users, counters.rows, counters.evicted_users) == (1, 3, 1)
    store.restore(NAMESPACE, as_user_rows(5, rows_at([1, 2, 3])))
    assert (state_of(store), times_of(store)) == (FOUND, [1, 2, 3, 4, 5, 6])
    assert store.open(NAMESPACE).stats().counters.evicted_users == 0


def test_the_state_of_an_evicted_user_outlives_the_process(open_store: OpenStore) -> None:
    store = open_store()
    save(store, [1, 2])
    store.evict(NAMESPACE, USER)
    save(store, [3])
    store.close()
    store = open_store()
    assert not store.started_empty
    assert (state_of(store), times_of(store)) == (EVICTED, [3])
    assert store.open(NAMESPACE).stats().counters.evicted_users == 1


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_is_stored_wins_over_what_comes_back(open_store: OpenStore, dtype: str) -> None:
    namespace = Namespace(dtype=dtype)
    rng = np.random.default_rng(8)
    source = RandomRows(namespace, rng, np.arange(12))
    for _ in range(6):
        store, reference = open_store(f"shard-{_}"), InProcessMemory(namespace)
        old_users, old = source.batch(300, span_ms=40)
        new_users, new = source.batch(int(rng.integers(1, 200)), span_ms=40)
        tier = InProcessMemory(namespace)
        tier.save(old_users, as_read(namespace, old))
        kept = tier.fetch(np.arange(12), ALL)
        store.save(namespace, new_users, new)
        store.restore(namespace, kept)
        reference.save(np.repeat(kept.user_ids, kept.counts), kept.rows)
        reference.save(new_users, as_read(namespace, new))
        found = store.open(namespace).lookup(np.arange(12), ALL)
        assert_same(found.rows, reference.fetch(np.arange(12), ALL))
        assert set(found.state.tolist()) <= {FOUND, ABSENT}
        store.restore(namespace, kept)  # again: nothing changes
        assert_same(store.open(namespace).fetch(np.arange(12), ALL), found.rows)


def test_a_raw_row_here_takes_its_memory_from_the_tier(store: ShardStore) -> None:
    raw = rows_at([7])
    raw["memory"], raw["written_step"], raw["feedback"] = 0, RAW_STEP, 4
    store.save(NAMESPACE, USER, raw)
    computed = rows_at([7])
    computed["feedback"] = 1
    store.restore(NAMESPACE, as_user_rows(5, computed))
    found = store.open(NAMESPACE).fetch(USER, 9).rows
    assert found["feedback"].tolist() == [5]
    assert found["memory"].tobytes() == computed["memory"].tobytes()
    assert found["written_step"].tolist() == [1]


def test_restoring_several_users_at_once(store: ShardStore) -> None:
    users, rows = series(NAMESPACE, 40, 30)
    store.save(NAMESPACE, users, rows)
    everything = store.open(NAMESPACE).fetch(np.arange(40), ALL)
    store.evict(NAMESPACE, np.arange(0, 40, 2))
    store.restore(NAMESPACE, everything)
    found = store.open(NAMESPACE).lookup(np.arange(40), ALL)
    assert_same(found.rows, everything)
    assert set(found.state.tolist()) == {FOUND}
    counters = store.open(NAMESPACE).stats().counters
    assert (counters.users, counters.rows) == (40, 1200)
    assert (counters.evicted_users, counters.evictions) == (0, 20)
    nobody = UserRows(np.empty(0, np.int64), np.zeros(1, np.int64), rows[:0])
    store.restore(NAMESPACE, nobody)


def test_what_the_tier_lacks_waits_until_it_is_marked(store: ShardStore) -> None:
    held = store.open(NAMESPACE)
    for user in range(10):
        save(store, [1, 2], user)
    assert held.num_unsaved == 10
    waiting = held.unsaved(4)
    assert waiting.rows.user_ids.tolist() == [0, 1, 2, 3]  # longest waiting first
    assert waiting.rows.counts.tolist() == [2, 2, 2, 2]
    store.mark_saved(NAMESPACE, waiting.rows.user_ids, waiting.versions)
    assert held.num_unsaved == 6
    assert held.unsaved(100).rows.user_ids.tolist() == [4, 5, 6, 7, 8, 9]


def test_a_change_while_the_tier_is_written_keeps_the_user_waiting(store: ShardStore) -> None:
    held = store.open(NAMESPACE)
    for user in range(4):
        save(store, [1], user)
    waiting = held.unsaved(10)
    save(store, [2], 0)  # in place
    save(store, [0], 1)  # late, so it is written anew
    store.evict(NAMESPACE, np.array([2]))
    store.mark_saved(NAMESPACE, waiting.rows.user_ids, waiting.versions)
    assert held.unsaved(10).rows.user_ids.tolist() == [0, 1]
    again = held.unsaved(10)
    assert again.rows.counts.tolist() == [2, 2]
    store.mark_saved(NAMESPACE, again.rows.user_ids, again.versions)
    assert held.num_unsaved == 0
    assert (state_of(store, 0), state_of(store, 2)) == (FOUND, EVICTED)


def test_who_waits_for_the_tier_is_known_after_a_restart(open_store: OpenStore) -> None:
    store = open_store()
    save(store, [1], 1)  # nobody tracks yet
    store.track_unsaved = True
    save(store, [1], 2)
    save(store, [1], 3)
    waiting = store.open(NAMESPACE).unsaved(1)
    store.mark_saved(NAMESPACE, waiting.rows.user_ids, waiting.versions)
    store.close()
    store = open_store()
    assert store.open(NAMESPACE).unsaved(10).rows.user_ids.tolist() == [3]


def test_removed_users_wait_for_nothing(store: ShardStore) -> None:
    held = store.open(NAMESPACE)
    for user in (1, 2, 3):
        save(store, [1, 2], user)
    store.evict(NAMESPACE, np.array([1]))
    held.remove(np.array([2]))
    store.forget(3, 5)
    waiting = held.unsaved(10)
    assert len(waiting.rows.rows) == 0
    store.mark_saved(NAMESPACE, waiting.rows.user_ids, waiting.versions)
    assert held.num_unsaved == 0
