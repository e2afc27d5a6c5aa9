"""Bad input is refused with a clear error, and nothing stored changes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import numpy as np
import pytest
from stored_rows import ALL, OpenStore, as_user_rows, proven_rows, series

from cache_actors.store import writer_lock
from cache_actors.store.errors import (
    MemoryFullError,
    MemoryStoreAbsentError,
    MemoryStoreError,
    NamespaceMismatchError,
)
from cache_actors.store.limits import StoreLimits
from cache_actors.store.mapped_shard import STORE_FORMAT, MappedShard
from cache_actors.store.shard_store import ShardStore
from marm.memory import Namespace, UserRows

NAMESPACE = Namespace()


def files_of(directory: Path) -> dict[str, bytes]:
    """What is in a directory, but for the tables in which LMDB notes who reads."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "lock.mdb"}


@contextmanager
def nothing_changes(store: ShardStore) -> Iterator[None]:
    before = files_of(store.directory)
    yield
    assert files_of(store.directory) == before


@pytest.fixture
def store(open_store: OpenStore) -> ShardStore:
    store = open_store()
    store.save(NAMESPACE, *series(NAMESPACE, 20, 30))
    return store


def bad_saves() -> list[tuple[str, np.ndarray, np.ndarray, type[Exception], str]]:
    users, rows = series(NAMESPACE, 4, 5)
    other_users, other = series(Namespace(dim=8), 4, 5)
    wide = series(Namespace(dtype="float32"), 4, 5)[1]
    plain = np.zeros(20)
    cases = [
        ("fewer ids", users[:-1], rows, ValueError, "one user id per row"),
        ("ids in a table", users.reshape(4, 5), rows, ValueError, "one user id per row"),
        ("rows in a table", users, rows.reshape(4, 5), ValueError, "one user id per row"),
        ("one row", users[0], rows[0], ValueError, "one user id per row"),
        ("another dim", other_users, other, NamespaceMismatchError, NAMESPACE.name),
        ("another dtype", users, wide, NamespaceMismatchError, NAMESPACE.name),
        ("no rows", users, plain, NamespaceMismatchError, NAMESPACE.name),
    ]
    for name, value in (("nan", np.nan), ("inf", np.inf), ("-inf", -np.inf)):
        broken = rows.copy()
        broken["memory"][7, 1, 31] = value
        cases.append((name, users, broken, ValueError, "1 of 20 rows are not, the first of user 3"))
    return cases


@pytest.mark.parametrize("case", bad_saves(), ids=lambda case: case[0])
def test_bad_rows_are_refused(store: ShardStore, case: tuple) -> None:
    _, users, rows, error, message = case
    with nothing_changes(store), pytest.raises(error, match=re.escape(message)):
        store.save(NAMESPACE, users, rows)
    if np.shape(users) == np.shape(rows) == (20,):
        bad = UserRows(np.unique(users), np.arange(0, 25, 5), rows)
        with nothing_changes(store), pytest.raises(error):
            store.restore(NAMESPACE, bad)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_what_is_not_finite_is_refused_by_every_format(open_store: OpenStore, dtype: str) -> None:
    namespace = Namespace(dtype=dtype)
    store = open_store()
    store.save(namespace, *series(namespace, 2, 5))
    users, rows = series(namespace, 2, 5)
    rows["memory"][0, 0, 0] = np.inf
    with nothing_changes(store), pytest.raises(ValueError, match="finite"):
        store.save(namespace, users, rows)


def test_bad_reads_are_refused(store: ShardStore) -> None:
    held = store.open(NAMESPACE)
    for users in (np.arange(2), np.arange(20)):
        with pytest.raises(ValueError, match="n must be at least 0 rows per user, got -1"):
            held.fetch(users, -1)
        for times in (np.zeros(1), np.zeros((len(users), 1)), np.int64(3)):
            with pytest.raises(ValueError, match="one time per user"):
                held.fetch(users, 1, times)
        with pytest.raises(ValueError, match="one id after another"):
            held.fetch(users.reshape(2, -1), 1)


def test_any_number_of_rows_may_be_asked_for(store: ShardStore) -> None:
    held = store.open(NAMESPACE)
    for users in (np.arange(2), np.arange(20)):
        assert held.fetch(users, 0).counts.tolist() == [0] * len(users)
        for n in (10**6, ALL, 2**63, 2**200):
            assert held.fetch(users, n).counts.tolist() == [30] * len(users)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_bytes": 1000},
        {"max_rows_per_user": 0},
        {"max_rows_per_user": -1},
        {"ttl_s": 0.5},
        {"ttl_s": float("nan")},
        {"namespace_bytes": (("ranking-l2-d32-float16-all-e0", 5),)},
    ],
)
def test_bad_limits_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        StoreLimits(**settings)


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"not a store" * 1000)
    with pytest.raises(MemoryStoreError, match="replay the event log"):
        ShardStore(tmp_path)
    with pytest.raises(MemoryStoreError, match="replay the event log"):
        MappedShard(tmp_path)
    assert (tmp_path / "data.mdb").read_bytes() == b"not a store" * 1000


def test_somebody_elses_database_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    env = lmdb.open(str(tmp_path), max_dbs=4)
    table = env.open_db(b"things")
    with env.begin(write=True) as transaction:
        transaction.put(b"key", b"value", db=table)
        transaction.put(b"another", b"value")
    env.close()
    before = (tmp_path / "data.mdb").read_bytes()
    with pytest.raises(MemoryStoreError, match="no memory store"):
        ShardStore(tmp_path)
    with pytest.raises(MemoryStoreAbsentError, match="facts"):
        MappedShard(tmp_path)
    assert (tmp_path / "data.mdb").read_bytes() == before


@pytest.mark.parametrize(
    ("fact", "message"),
    [
        (b'{"format": 1, "generation": "a"}', f"must have format {STORE_FORMAT}, has 1"),
        (b'{"format": 99, "generation": "a"}', f"must have format {STORE_FORMAT}, has 99"),
        (b"{}", "not a memory store"),
        (b"\xff\x00", "not a memory store"),
        (b"[]", "not a memory store"),
    ],
)
def test_another_format_is_refused(
    open_store: OpenStore, tmp_path: Path, fact: bytes, message: str
) -> None:
    store = open_store()
    store.save(NAMESPACE, *series(NAMESPACE, 2, 5))
    store.close()
    env = lmdb.open(str(tmp_path / "shard"), max_dbs=4)
    table = env.open_db(b"facts")
    with env.begin(write=True) as transaction:
        transaction.put(b"format", fact, db=table)
    env.close()
    for opened in (ShardStore, MappedShard):
        with pytest.raises(MemoryStoreError, match=message):
            opened(tmp_path / "shard")


def test_a_reader_needs_a_store_and_a_namespace(open_store: OpenStore, tmp_path: Path) -> None:
    with pytest.raises(MemoryStoreAbsentError, match="no memory store"):
        MappedShard(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    store = open_store()
    mapped = MappedShard(tmp_path / "shard")
    with pytest.raises(MemoryStoreAbsentError, match="open it with the writer"):
        mapped.open(NAMESPACE)
    store.open(NAMESPACE)
    assert len(mapped.open(NAMESPACE).fetch(np.arange(3), 3).rows) == 0
    mapped.close()


def test_a_namespace_is_made_only_by_the_writer(open_store: OpenStore, tmp_path: Path) -> None:
    open_store().close()
    mapped = MappedShard(tmp_path / "shard")
    with pytest.raises(MemoryStoreAbsentError, match="let its writer make it first"):
        mapped.open(NAMESPACE)
    mapped.close()


def test_a_process_that_reads_a_store_can_not_write_it(
    open_store: OpenStore, tmp_path: Path
) -> None:
    open_store().close()
    mapped = MappedShard(tmp_path / "shard")
    with pytest.raises(MemoryStoreError, match="close the reader first"):
        ShardStore(tmp_path / "shard")
    mapped.close()
    open_store().close()  # a refused opening leaves nothing open


def test_a_store_has_one_writer(store: ShardStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_lock, "_PATIENCE_S", 0.05)
    with nothing_changes(store), pytest.raises(MemoryStoreError, match="has a writer already"):
        ShardStore(store.directory)
    store.close()
    ShardStore(store.directory).close()


def test_a_batch_that_never_fits_costs_nobody_his_rows(open_store: OpenStore) -> None:
    store = open_store(limits=StoreLimits(max_bytes=4 << 20))
    store.save(NAMESPACE, *series(NAMESPACE, 50, 100))
    users, rows = series(NAMESPACE, 50, 1000, start_ms=10**6)
    before = store.open(NAMESPACE).fetch(np.arange(50), ALL).rows.tobytes()
    with pytest.raises(MemoryFullError, match="nothing of this batch was stored"):
        store.save(NAMESPACE, users, rows)
    assert store.open(NAMESPACE).fetch(np.arange(50), ALL).rows.tobytes() == before
    assert store.open(NAMESPACE).stats().counters.evictions == 0


def test_files_of_others_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    store = ShardStore(tmp_path)
    store.save(NAMESPACE, *series(NAMESPACE, 2, 2))
    store.drop(NAMESPACE)
    store.close()
    ShardStore(tmp_path).close()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_unknown_users_are_no_error_anywhere(store: ShardStore) -> None:
    held = store.open(NAMESPACE)
    nobody = np.array([-5, 10**12])
    assert store.evict(NAMESPACE, nobody) == 0
    assert store.repair(NAMESPACE, nobody) == 0
    assert held.remove(nobody) == 0
    assert store.forget(-5, 10) == 0
    store.touch(NAMESPACE, nobody.tolist())
    store.mark_saved(NAMESPACE, nobody, np.zeros(2, np.uint32))
    assert held.stats().users == 20
    assert held.stats().rows == 600


def test_a_directory_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "file"))):
        ShardStore(tmp_path / "file" / "shard")
    assert os.listdir(tmp_path) == ["file"]


def test_restored_rows_of_another_shape_are_refused(store: ShardStore) -> None:
    rows = proven_rows(NAMESPACE, np.full(3, 1), np.arange(3))
    mismatched = UserRows(np.array([1]), np.array([0, 2]), rows)
    with nothing_changes(store), pytest.raises(ValueError, match="one user id per row"):
        store.restore(NAMESPACE, mismatched)
    store.restore(NAMESPACE, as_user_rows(1, rows))
