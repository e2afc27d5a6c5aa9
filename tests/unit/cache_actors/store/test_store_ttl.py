"""Users to whom nothing was written for long: not seen any more, and removed."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from stored_rows import ALL, OpenStore, as_user_rows, proven_rows

from cache_actors.store.limits import StoreLimits
from cache_actors.store.lookup import UserState
from cache_actors.store.mapped_shard import MappedShard
from cache_actors.store.shard_store import ShardStore
from marm.memory import Namespace

NAMESPACE = Namespace(depth=4, dim=64)
ROWS_PER_USER = 50


def save_user(store: ShardStore, user: int) -> None:
    times = np.arange(ROWS_PER_USER) + user
    users = np.full(ROWS_PER_USER, user)
    store.save(NAMESPACE, users, proven_rows(NAMESPACE, users, times))


def set_clock(monkeypatch: pytest.MonkeyPatch, now_s: float) -> None:
    monkeypatch.setattr(time, "time", lambda: now_s)


def states(store: ShardStore, users: list[int]) -> list[int]:
    """States of users; read one by one and together, they agree."""
    held = store.open(NAMESPACE)
    ids = np.array(users + list(range(10**6, 10**6 + 5)))
    together = held.lookup(ids, ALL)
    alone = [held.lookup(ids[i : i + 1], ALL) for i in range(len(users))]
    assert [int(found.state[0]) for found in alone] == together.state[: len(users)].tolist()
    out = np.zeros(1000, NAMESPACE.row_dtype)
    for index, user in enumerate(users):
        count = int(together.rows.counts[index])
        assert held.fetch_into(user, 1000, out) == count
        assert alone[index].rows.counts.tolist() == [count]
    return together.state[: len(users)].tolist()


def test_users_to_whom_nothing_was_written_expire(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(limits=StoreLimits(ttl_s=100))
    found, absent = UserState.FOUND, UserState.ABSENT
    set_clock(monkeypatch, 1000.9)
    save_user(store, 1)
    save_user(store, 2)
    set_clock(monkeypatch, 1050.0)
    save_user(store, 2)
    set_clock(monkeypatch, 1100.9)
    assert states(store, [1, 2]) == [found, found]
    assert store.expire(1100) == 0
    set_clock(monkeypatch, 1101.0)
    assert states(store, [1, 2]) == [absent, found]
    assert list(store.open(NAMESPACE).fetch(np.array([1]), ALL).rows) == []
    assert store.expire(1101) == 1
    stats = store.open(NAMESPACE).stats()
    assert (stats.users, stats.rows, stats.counters.expired) == (1, ROWS_PER_USER, 1)
    set_clock(monkeypatch, 2000.0)
    assert states(store, [1, 2]) == [absent, absent]
    save_user(store, 1)  # a new life, not the old rows again
    rows = proven_rows(NAMESPACE, np.array([2]), np.array([5]))
    store.save(NAMESPACE, np.array([2]), rows)  # expired, but nobody swept yet
    assert states(store, [1, 2]) == [found, found]
    assert store.open(NAMESPACE).fetch(np.array([2]), ALL).rows.tobytes() == rows.tobytes()
    assert store.open(NAMESPACE).stats().rows == ROWS_PER_USER + 1


def test_only_saves_make_users_live_longer(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(limits=StoreLimits(ttl_s=100))
    set_clock(monkeypatch, 1000.0)
    for user in range(5):
        save_user(store, user)
    set_clock(monkeypatch, 1090.0)
    store.touch(NAMESPACE, [0])
    store.evict(NAMESPACE, np.array([1]))
    rows = proven_rows(NAMESPACE, np.full(2, 1), np.arange(2))
    store.restore(NAMESPACE, as_user_rows(1, rows))
    store.forget(2, 10)
    store.repair(NAMESPACE, np.array([3]))
    waiting = store.open(NAMESPACE).unsaved(10)
    store.mark_saved(NAMESPACE, waiting.rows.user_ids, waiting.versions)
    store.evict(NAMESPACE, np.array([4]))
    assert UserState.ABSENT not in states(store, [0, 1, 2, 3, 4])
    set_clock(monkeypatch, 1101.0)
    assert states(store, [0, 1, 2, 3, 4]) == [UserState.ABSENT] * 5
    assert store.expire(1101) == 5
    stats = store.open(NAMESPACE).stats()
    assert (stats.users, stats.rows, stats.counters.evicted_users) == (0, 0, 0)


def test_a_save_to_an_expired_evicted_user_starts_afresh(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(limits=StoreLimits(ttl_s=100))
    set_clock(monkeypatch, 1000.0)
    save_user(store, 1)
    store.evict(NAMESPACE, np.array([1]))
    assert states(store, [1]) == [UserState.EVICTED]
    set_clock(monkeypatch, 2000.0)
    assert states(store, [1]) == [UserState.ABSENT]
    save_user(store, 1)
    assert states(store, [1]) == [UserState.FOUND]
    assert store.open(NAMESPACE).stats().counters.evicted_users == 0


def read_states(directory: Path, users: np.ndarray) -> list[int]:
    shard = MappedShard(directory)
    found = shard.open(NAMESPACE).lookup(users, ALL)
    shard.close()
    assert ((found.rows.counts > 0) == (found.state == UserState.FOUND)).all()
    return found.state.tolist()


def test_readers_elsewhere_see_limits_at_once(
    open_store: OpenStore,
    other_process: ProcessPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_clock(monkeypatch, time.time() - 1000)
    store = open_store()
    save_user(store, 1)
    monkeypatch.undo()
    save_user(store, 2)
    users = np.arange(1, 3)
    ask = (read_states, store.directory, users)
    assert other_process.submit(*ask).result(60) == [UserState.FOUND, UserState.FOUND]
    store.close()
    store = open_store(limits=StoreLimits(ttl_s=500))
    assert other_process.submit(*ask).result(60) == [UserState.ABSENT, UserState.FOUND]
