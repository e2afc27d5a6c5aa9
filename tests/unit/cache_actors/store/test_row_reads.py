"""Every way to read gives what the reference gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from stored_rows import ALL, INT64, OpenStore, RandomRows, as_user_rows, assert_same, series

from cache_actors.store.errors import NamespaceMismatchError
from cache_actors.store.limits import StoreLimits
from cache_actors.store.lookup import UserState
from cache_actors.store.mapped_shard import MappedShard
from cache_actors.store.namespace_store import NamespaceStore
from cache_actors.store.row_formats import as_read
from marm.addressing import user_bucket
from marm.memory import InProcessMemory, Namespace, UserRows

NAMESPACES = [
    Namespace(depth=0, dim=1),
    Namespace(),
    Namespace(depth=3, dim=5),
    Namespace(depth=4, dim=64, dtype="float32"),
    Namespace(depth=2, dim=32, dtype="int8"),
    Namespace(depth=1, dim=3, dtype="int8"),
    Namespace(depth=2, dim=400),
]
USERS = np.array([INT64.min, -7, -1, 0, 1, 2, 40, INT64.max, *range(100, 140)], np.int64)


def one_by_one(store: NamespaceStore, users: np.ndarray, n: int, before: np.ndarray | None):
    """What reads of single users give, put together."""
    parts = [
        store.fetch(users[i : i + 1], n, None if before is None else before[i : i + 1]).rows
        for i in range(len(users))
    ]
    offsets = np.zeros(len(users) + 1, np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    packed = np.concatenate(parts) if parts else np.empty(0, store.namespace.row_dtype)
    return UserRows(users, offsets, packed)


@pytest.mark.parametrize("max_rows", [None, 1, 7, 40])
@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda namespace: namespace.name)
def test_random_saves_read_back_like_the_reference(
    open_store: OpenStore, tmp_path: Path, namespace: Namespace, max_rows: int | None
) -> None:
    rng = np.random.default_rng(max_rows or 0)
    store = open_store(limits=StoreLimits(max_rows_per_user=max_rows))
    reference = InProcessMemory(namespace, max_rows)
    source = RandomRows(namespace, rng, USERS[:-3])
    held = store.open(namespace)
    mapped = MappedShard(tmp_path / "shard")
    reader = mapped.open(namespace)
    for step in range(6):
        user_ids, rows = source.batch(int(rng.integers(1, 700)), span_ms=30 * 10**step)
        if step == 3:  # a long history of one user
            user_ids[:] = 40
        before_save = rows.tobytes()
        store.save(namespace, user_ids, rows)
        assert rows.tobytes() == before_save
        reference.save(user_ids, as_read(namespace, rows))
        for n in (0, 1, 5, 64, 10**6, ALL):
            users = rng.permutation(USERS)[: rng.integers(1, len(USERS))]
            for before in (None, rng.integers(-(10**5), 10**5, len(users))):
                expected = reference.fetch(users, n, before)
                assert_same(reader.fetch(users, n, before), expected)
                if n in (5, ALL):
                    assert_same(one_by_one(held, users, n, before), expected)
    expected = reference.fetch(USERS, ALL)
    everything = {user: expected.of(i).tobytes() for i, user in enumerate(USERS.tolist())}
    scanned = {}
    for bucket in sorted(set(user_bucket(USERS).tolist())):
        for part in held.scan(bucket):
            for index, user in enumerate(part.user_ids.tolist()):
                assert user not in scanned
                scanned[user] = part.of(index).tobytes()
    assert scanned == {user: data for user, data in everything.items() if data}
    stats = held.stats()
    assert stats.users == len(scanned)
    if max_rows is None:
        assert stats.rows == len(expected.rows)
    else:  # hidden rows are of extents that are not wholly hidden
        assert len(expected.rows) <= stats.rows <= len(expected.rows) + stats.users * 127
    mapped.close()


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda namespace: namespace.name)
def test_a_selection_of_layers_is_the_beginning_of_all(
    open_store: OpenStore, namespace: Namespace
) -> None:
    store = open_store()
    held = store.open(namespace)
    source = RandomRows(namespace, np.random.default_rng(5), USERS)
    store.save(namespace, *source.batch(900, span_ms=10**6))
    for users in (USERS, USERS[:2]):
        whole = held.lookup(users, 9)
        for layers in (None, *range(namespace.depth + 1)):
            some = held.lookup(users, 9, layers=layers)
            assert some.rows.rows.dtype == namespace.layers_dtype(layers)
            assert some.state.tolist() == whole.state.tolist()
            assert some.rows.offsets.tolist() == whole.rows.offsets.tolist()
            memory = whole.rows.rows["memory"][:, : namespace.depth if layers is None else layers]
            assert some.rows.rows["memory"].tobytes() == memory.tobytes()
            for name in ("event_key", "timestamp_ms", "item_id", "feedback", "written_s"):
                assert (some.rows.rows[name] == whole.rows.rows[name]).all()
    for wrong in (-1, namespace.depth + 1):
        with pytest.raises(ValueError, match="layers must be None or between 0"):
            held.fetch(USERS, 9, layers=wrong)


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda namespace: namespace.name)
@pytest.mark.parametrize("max_rows", [None, 30])
def test_reading_into_an_array_gives_the_newest_rows(
    open_store: OpenStore, namespace: Namespace, max_rows: int | None
) -> None:
    store = open_store(limits=StoreLimits(max_rows_per_user=max_rows))
    held = store.open(namespace)
    source = RandomRows(namespace, np.random.default_rng(5), USERS[:-1])
    store.save(namespace, *source.batch(4000, span_ms=10**6))
    out = np.zeros(200, namespace.row_dtype)
    for user in USERS.tolist():
        for n in (0, 1, 17, 200):
            expected = held.fetch(np.array([user]), n).rows
            count = held.fetch_into(user, n, out)
            assert count == len(expected)
            assert out[:count].tobytes() == expected.tobytes()


def test_what_can_not_be_read_into_is_refused(open_store: OpenStore) -> None:
    namespace = Namespace()
    store = open_store()
    store.save(namespace, *series(namespace, 1, 20))
    held = store.open(namespace)
    out = np.zeros(10, namespace.row_dtype)
    for wrong in (np.zeros(10, Namespace(dim=8).row_dtype), out.reshape(2, 5), out[::2]):
        with pytest.raises(NamespaceMismatchError, match=namespace.name):
            held.fetch_into(0, 2, wrong)
    for n in (-1, 11):
        with pytest.raises(ValueError, match="n must be between 0 and the 10 rows"):
            held.fetch_into(0, n, out)
    assert not out.tobytes().strip(b"\0")
    locked = np.zeros(10, namespace.row_dtype)
    locked.flags.writeable = False
    with pytest.raises(TypeError, match="read-only"):
        held.fetch_into(0, 2, locked)


def test_fetched_rows_are_a_copy_of_their_own(open_store: OpenStore) -> None:
    namespace = Namespace()
    store = open_store()
    store.save(namespace, *series(namespace, 8, 3))
    held = store.open(namespace)
    for users in (np.arange(2), np.arange(8)):
        found = held.fetch(users, 3)
        found.rows["memory"] = 9  # writable, so that tensors can be made of it without a warning
        assert (held.fetch(users, 3).rows["memory"] < 9).all()


def test_nothing_to_fetch_is_an_empty_answer(open_store: OpenStore) -> None:
    namespace = Namespace()
    store = open_store()
    held = store.open(namespace)
    nobody = held.lookup(np.empty(0, np.int64), 5)
    assert nobody.rows.offsets.tolist() == [0]
    assert nobody.rows.rows.dtype == namespace.row_dtype
    assert nobody.state.tolist() == []
    for count in (2, 20):
        unknown = held.lookup(np.arange(count), 5, np.zeros(count, np.int64))
        assert unknown.rows.offsets.tolist() == [0] * (count + 1)
        assert unknown.state.tolist() == [UserState.ABSENT] * count
    assert held.fetch_into(4, 1, np.zeros(1, namespace.row_dtype)) == 0
    store.save(namespace, np.empty(0, np.int64), np.empty(0, namespace.row_dtype))
    assert held.stats().rows == 0
    assert held.users(0).tolist() == []


def test_a_row_larger_than_any_chunk_is_stored(open_store: OpenStore) -> None:
    namespace = Namespace(depth=4, dim=4096, dtype="float32")
    store = open_store()
    rows = np.zeros(5, namespace.row_dtype)
    rows["timestamp_ms"] = [3, 1, 2, 9, 7]
    store.save(namespace, np.zeros(5, np.int64), rows)
    found = store.open(namespace).fetch(np.zeros(1, np.int64), 3)
    assert found.rows["timestamp_ms"].tolist() == [3, 7, 9]


def test_the_extremes_of_times_and_keys(open_store: OpenStore) -> None:
    namespace = Namespace()
    store, reference = open_store(), InProcessMemory(namespace)
    rows = np.zeros(8, namespace.row_dtype)
    rows["timestamp_ms"] = [INT64.max, INT64.min, 0, -1, INT64.max, INT64.min, 0, 1]
    rows["event_key"] = [0, 0, 2**64 - 1, 5, 2**64 - 1, 2**64 - 1, 0, 2**63]
    users = np.full(8, INT64.min)
    for part in (slice(0, 3), slice(3, 5), slice(5, 8)):
        store.save(namespace, users[part], rows[part])
        reference.save(users[part], rows[part])
        for before in (None, INT64.min, -1, 0, 1, INT64.max):
            times = None if before is None else np.array([before])
            assert_same(
                store.open(namespace).fetch(users[:1], 9, times),
                reference.fetch(users[:1], 9, times),
            )


def test_reads_of_one_process_share_the_writers_store(
    open_store: OpenStore, tmp_path: Path
) -> None:
    namespace = Namespace()
    store = open_store()
    store.save(namespace, *series(namespace, 3, 4))
    mapped = MappedShard(tmp_path / "shard")
    expected = store.open(namespace).fetch(np.arange(3), 10)
    assert_same(mapped.open(namespace).fetch(np.arange(3), 10), expected)
    assert mapped.generation == store.generation
    mapped.close()
    assert_same(store.open(namespace).fetch(np.arange(3), 10), expected)


def test_a_saved_user_equals_rows_given_one_by_one(open_store: OpenStore) -> None:
    namespace = Namespace()
    store = open_store()
    users, rows = series(namespace, 1, 700)
    for index in range(300):
        store.save(namespace, users[index : index + 1], rows[index : index + 1])
    store.save(namespace, users[300:], rows[300:])
    assert_same(store.open(namespace).fetch(np.array([0]), ALL), as_user_rows(0, rows))
