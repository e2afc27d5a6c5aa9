"""Forgetting users, owning buckets, and dropping namespaces."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from stored_rows import (
    ALL,
    OpenStore,
    are_proven,
    as_user_rows,
    assert_same,
    proven_rows,
    series,
    users_of_bucket,
)

from cache_actors.store.lookup import UserState
from cache_actors.store.mapped_shard import MappedShard
from cache_actors.store.namespace_store import NamespaceStore
from cache_actors.store.namespace_writer import BucketMovedError
from cache_actors.store.row_file import RowFile
from cache_actors.store.shard_store import ShardStore
from marm.addressing import NUM_BUCKETS, user_bucket
from marm.memory import Namespace

NAMESPACE = Namespace()
OTHER = Namespace(depth=1, dim=3, dtype="int8")
BOTH = (NAMESPACE, OTHER)


def fill(store: ShardStore, num_users: int = 20, per_user: int = 30) -> None:
    for namespace in BOTH:
        store.save(namespace, *series(namespace, num_users, per_user))


def times_of(store: ShardStore, user: int, namespace: Namespace = NAMESPACE) -> list[int]:
    found = store.open(namespace).fetch(np.array([user]), ALL)
    return found.rows["timestamp_ms"].tolist()


def states(store: NamespaceStore, users: np.ndarray) -> list[int]:
    return store.lookup(users, ALL).state.tolist()


def test_a_forgotten_user_is_gone_from_every_namespace_and_stays_so(
    open_store: OpenStore,
) -> None:
    store = open_store()
    fill(store)
    everything = {n: store.open(n).fetch(np.arange(20), ALL) for n in BOTH}
    assert store.forget(7, 10**6) == 60
    for _ in range(2):
        for namespace in BOTH:
            assert times_of(store, 7, namespace) == []
            assert states(store.open(namespace), np.array([7])) == [UserState.ABSENT]
            # A replay of the log, and of what a tier kept, brings nothing back.
            store.save(namespace, *series(namespace, 20, 30))
            store.restore(namespace, everything[namespace])
            assert times_of(store, 7, namespace) == []
            stats = store.open(namespace).stats()
            assert (stats.users, stats.rows) == (19, 570)
        assert store.forgotten() == {7: 10**6}
        assert store.stats().forgotten_users == 1
        store.close()
        store = open_store()
    assert store.open(NAMESPACE).stats().counters.forgotten_rows >= 30 + 30


def test_rows_after_the_time_stay_and_new_ones_come(open_store: OpenStore) -> None:
    store = open_store()
    users = np.full(300, 3)
    store.save(NAMESPACE, users, proven_rows(NAMESPACE, users, np.arange(300)))
    assert store.forget(3, 249) == 250
    assert times_of(store, 3) == list(range(250, 300))
    store.save(NAMESPACE, users, proven_rows(NAMESPACE, users, np.arange(150, 450)))
    assert times_of(store, 3) == list(range(250, 450))
    assert store.forget(3, 100) == 0  # an earlier time takes nothing back
    assert store.forgotten() == {3: 249}
    found = store.open(NAMESPACE).fetch(np.array([3]), ALL)
    assert are_proven(NAMESPACE, found)
    assert store.open(NAMESPACE).stats().rows == 200


def test_rows_that_were_refused_are_counted(open_store: OpenStore) -> None:
    store = open_store()
    store.forget(3, 100)
    before = store.open(NAMESPACE).stats().counters.forgotten_rows
    users = np.full(10, 3)
    store.save(NAMESPACE, users, proven_rows(NAMESPACE, users, np.arange(10)))
    store.save(NAMESPACE, users, proven_rows(NAMESPACE, users, np.arange(95, 105)))
    assert times_of(store, 3) == [101, 102, 103, 104]
    assert store.open(NAMESPACE).stats().counters.forgotten_rows == before + 16


def test_an_evicted_user_is_forgotten_too(open_store: OpenStore) -> None:
    store = open_store()
    fill(store)
    everything = store.open(NAMESPACE).fetch(np.array([4]), ALL)
    store.evict(NAMESPACE, np.array([4]))
    assert store.forget(4, 10**6) == 30  # those of the other namespace
    assert states(store.open(NAMESPACE), np.array([4])) == [UserState.ABSENT]
    store.restore(NAMESPACE, everything)
    assert times_of(store, 4) == []
    assert store.open(NAMESPACE).stats().counters.evicted_users == 0


def test_a_user_who_was_never_here_may_be_forgotten(open_store: OpenStore) -> None:
    store = open_store()
    store.forget(-9, 50)
    store.close()
    store = open_store()
    store.save(NAMESPACE, np.array([-9]), proven_rows(NAMESPACE, np.array([-9]), np.array([50])))
    assert times_of(store, -9) == []
    later = Namespace(epoch=1)  # made after the request
    store.save(later, np.array([-9]), proven_rows(later, np.array([-9]), np.array([50])))
    assert times_of(store, -9, later) == []


def test_a_new_store_owns_what_it_is_told(open_store: OpenStore) -> None:
    owned = np.zeros(NUM_BUCKETS, np.bool_)
    owned[[3, 77]] = True
    store = open_store(owned=owned)
    assert np.flatnonzero(store.owned()).tolist() == [3, 77]
    for bucket in (3, 77):
        users = users_of_bucket(bucket, 3)
        store.save(NAMESPACE, users, proven_rows(NAMESPACE, users, np.arange(3)))
    users = np.append(users_of_bucket(3, 2), users_of_bucket(4, 1))
    with pytest.raises(BucketMovedError, match="nothing of it was stored"):
        store.save(NAMESPACE, users, proven_rows(NAMESPACE, users, np.arange(10, 13)))
    with pytest.raises(BucketMovedError, match="Read the placement again"):
        store.restore(
            NAMESPACE, as_user_rows(int(users[2]), proven_rows(NAMESPACE, users, users)[:1])
        )
    assert store.open(NAMESPACE).stats().rows == 6
    store.close()
    store = open_store(owned=~owned)  # a store that exists knows better
    assert np.flatnonzero(store.owned()).tolist() == [3, 77]


_held: dict[Path, MappedShard] = {}


def held_states(directory: Path, users: np.ndarray) -> tuple[list[int], list[int]]:
    """States and row counts, through a reader that stays open from call to call."""
    if directory not in _held:
        _held[directory] = MappedShard(directory)
    held = _held[directory].open(NAMESPACE)
    found = held.lookup(users, ALL)
    assert are_proven(NAMESPACE, found.rows)
    out = np.zeros(100, NAMESPACE.row_dtype)
    for index, user in enumerate(users.tolist()):
        alone = held.lookup(users[index : index + 1], ALL)
        assert alone.state[0] == found.state[index]
        assert held.fetch_into(user, 100, out) == alone.rows.counts[0]
    return found.state.tolist(), found.rows.counts.tolist()


def test_readers_elsewhere_learn_at_once_who_owns_a_bucket(
    open_store: OpenStore, other_process: ProcessPoolExecutor
) -> None:
    store = open_store()
    users = np.concatenate([users_of_bucket(5, 4), users_of_bucket(9, 4)])
    store.save(NAMESPACE, users, proven_rows(NAMESPACE, users, np.arange(8)))

    def ask() -> tuple[list[int], list[int]]:
        return other_process.submit(held_states, store.directory, users).result(60)

    here, elsewhere = UserState.FOUND, UserState.ELSEWHERE
    assert ask() == ([here] * 8, [1] * 8)
    store.disown([5])
    assert ask() == ([elsewhere] * 4 + [here] * 4, [0] * 4 + [1] * 4)
    with pytest.raises(BucketMovedError):
        store.save(NAMESPACE, users[:1], proven_rows(NAMESPACE, users[:1], np.array([99])))
    store.own([5])  # its rows were kept
    assert ask() == ([here] * 8, [1] * 8)
    store.disown([5])
    assert store.delete_bucket(5) == 4
    store.own([5])
    assert ask() == ([UserState.ABSENT] * 4 + [here] * 4, [0] * 4 + [1] * 4)
    assert store.open(NAMESPACE).stats().rows == 4


def test_deleting_a_bucket_removes_it_from_every_namespace(open_store: OpenStore) -> None:
    store = open_store()
    fill(store, num_users=2000, per_user=2)
    everything = np.arange(2000)
    mine = everything[user_bucket(everything) == 17]
    store.evict(NAMESPACE, mine[:2])
    store.forget(int(mine[0]), 10)
    num_left = len(store.open(NAMESPACE).users(17)) + len(store.open(OTHER).users(17))
    assert store.delete_bucket(17) == num_left
    for namespace in BOTH:
        held = store.open(namespace)
        assert held.users(17).tolist() == []
        assert held.stats().users == 2000 - len(mine)
        others = everything[user_bucket(everything) != 17]
        assert len(held.fetch(others, ALL).rows) == 2 * len(others)
    assert store.open(NAMESPACE).stats().counters.evicted_users == 0
    assert int(mine[0]) in store.forgotten()


def test_a_bucket_moves_to_another_store(open_store: OpenStore) -> None:
    source, target = open_store("a"), open_store("b", owned=np.zeros(NUM_BUCKETS, np.bool_))
    fill(source, num_users=3000, per_user=2)
    bucket = 200
    for user, until in source.forgotten().items():
        target.forget(user, until)
    target.own([bucket])
    for namespace in BOTH:
        for chunk in source.open(namespace).scan(bucket):
            target.restore(namespace, chunk)
    users = source.open(NAMESPACE).users(bucket)
    expected = {namespace: source.open(namespace).fetch(users, ALL) for namespace in BOTH}
    source.disown([bucket])
    source.delete_bucket(bucket)
    for namespace in BOTH:
        assert_same(target.open(namespace).fetch(users, ALL), expected[namespace])
        assert len(source.open(namespace).fetch(users, ALL).rows) == 0
        assert list(source.open(namespace).scan(bucket)) == []


def test_a_dropped_namespace_starts_again_and_readers_follow(
    open_store: OpenStore, other_process: ProcessPoolExecutor
) -> None:
    store = open_store()
    fill(store)
    users = np.arange(20)
    ask = (held_states, store.directory, users)
    assert other_process.submit(*ask).result(60)[1] == [30] * 20
    store.drop(NAMESPACE)
    assert other_process.submit(*ask).result(60) == ([UserState.ABSENT] * 20, [0] * 20)
    stats = store.open(NAMESPACE).stats()
    assert (stats.users, stats.rows, stats.counters.saves) == (0, 0, 0)
    store.save(NAMESPACE, *series(NAMESPACE, 20, 5, start_ms=10**6))
    assert other_process.submit(*ask).result(60) == ([UserState.FOUND] * 20, [5] * 20)
    assert store.open(OTHER).stats().rows == 600
    files = [path.name for path in store.directory.glob(f"{NAMESPACE.name}-*")]
    assert len(files) == 2
    store.close()
    store = open_store()
    assert store.open(NAMESPACE).stats().rows == 100
    assert set(store.namespaces()) == set(BOTH)


def test_files_of_a_drop_that_was_cut_short_are_deleted(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    fill(store)
    with monkeypatch.context() as patch:
        patch.setattr(RowFile, "unlink", RowFile.close)  # died before it came to this
        store.drop(NAMESPACE)
    assert len(list(store.directory.glob(f"{NAMESPACE.name}-*"))) == 4
    store.close()
    store = open_store()
    assert len(list(store.directory.glob(f"{NAMESPACE.name}-*"))) == 2
    assert store.open(NAMESPACE).stats().rows == 0
    assert store.open(OTHER).stats().rows == 600


def test_the_generation_tells_stores_that_started_empty(open_store: OpenStore) -> None:
    store = open_store()
    assert store.started_empty
    generation = store.generation
    store.close()
    store = open_store()
    assert not store.started_empty
    assert store.generation == generation
    assert open_store("other").generation != generation
