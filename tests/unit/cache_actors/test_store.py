"""The store on disk: its layout, its limits, and what other processes see of it."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cache_actors.store.lmdb_environment import (
    MemoryStoreAbsentError,
    MemoryStoreError,
    NamespaceMismatchError,
)
from cache_actors.store.pages import PageLayout, key_prefixes, key_suffix, user_of_prefix
from cache_actors.store.lmdb_memory import LmdbMemory
from marm.memory import RAW_STEP, InProcessMemory, Namespace

NAMESPACE = Namespace()


def make_rows(num_users: int, per_user: int, start_ms: int = 0, step: int = 1):
    """``per_user`` rows of each user, interleaved in time as a log has them."""
    count = num_users * per_user
    rows = np.zeros(count, NAMESPACE.row_dtype)
    rows["timestamp_ms"] = start_ms + np.arange(count)
    rows["event_key"] = np.arange(count) + start_ms
    rows["item_id"] = np.arange(count) * 7
    rows["written_step"] = step
    rows["memory"] = np.arange(count)[:, None, None] % 100
    return np.arange(count, dtype=np.int64) % num_users, rows


def fetch_bytes(path: Path, user_ids: np.ndarray, n: int) -> tuple[bytes, list[int]]:
    store = LmdbMemory(path, NAMESPACE, readonly=True)
    found = store.fetch(user_ids, n)
    store.close()
    return found.rows.tobytes(), found.offsets.tolist()


_held: dict[Path, LmdbMemory] = {}


def fetch_held(path: Path, user_ids: np.ndarray, n: int) -> bytes:
    """Fetch through a reader that stays open from call to call."""
    if path not in _held:
        _held[path] = LmdbMemory(path, NAMESPACE, readonly=True)
    return _held[path].fetch(user_ids, n).rows.tobytes()


@pytest.fixture
def other_process() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        yield pool


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LmdbMemory]:
    opened = LmdbMemory(tmp_path / "store", NAMESPACE)
    yield opened
    opened.close()


def test_page_keys_sort_like_users_and_times() -> None:
    users = np.array([-(2**63), -5, 0, 3, 2**63 - 1], np.int64)
    prefixes = key_prefixes(users)
    assert [user_of_prefix(prefix) for prefix in prefixes] == users.tolist()
    unsigned = [prefix[1:] for prefix in prefixes]
    assert unsigned == sorted(unsigned)
    identities = [(-(2**63), 0), (-1, 2**64 - 1), (0, 0), (0, 5), (7, 1), (2**63 - 1, 2**64 - 1)]
    suffixes = [key_suffix(*identity) for identity in identities]
    assert suffixes == sorted(suffixes)


@pytest.mark.parametrize(
    ("depth", "dim", "dtype"),
    [(0, 1, "float16"), (2, 32, "float16"), (4, 128, "float16"), (8, 512, "float32")],
)
def test_pages_fit_just_below_whole_store_pages(depth: int, dim: int, dtype: str) -> None:
    layout = PageLayout.of(Namespace(depth=depth, dim=dim, dtype=dtype))
    page_bytes = layout.rows_per_page * layout.row_bytes + 16
    assert page_bytes <= 8 * 4096
    assert page_bytes > 4096
    wasted = -page_bytes % 4096
    assert wasted < layout.row_bytes


def test_a_row_larger_than_any_page_is_a_page_of_its_own(tmp_path: Path) -> None:
    namespace = Namespace(depth=4, dim=4096, dtype="float32")
    assert PageLayout.of(namespace).rows_per_page == 1
    rows = np.zeros(3, namespace.row_dtype)
    rows["timestamp_ms"] = [3, 1, 2]
    store = LmdbMemory(tmp_path, namespace)
    store.save(np.zeros(3, np.int64), rows)
    found = store.fetch(np.zeros(1, np.int64), 2)
    assert found.rows["timestamp_ms"].tolist() == [2, 3]
    store.close()


def test_an_append_fills_pages_and_an_insertion_splits_them_evenly() -> None:
    layout = PageLayout.of(NAMESPACE)
    _, rows = make_rows(1, layout.rows_per_page + 10)
    data = rows.tobytes()
    assert [layout.count(p) for p in layout.cut(data, b"", b"")] == [layout.rows_per_page, 10]
    split = layout.cut(b"", data[: -layout.row_bytes], data[-layout.row_bytes :])
    sizes = [layout.count(page) for page in split]
    assert sum(sizes) == layout.rows_per_page + 10
    assert max(sizes) - min(sizes) <= 1
    assert b"".join(split) == data


def test_fetched_rows_are_a_copy_of_their_own(store: LmdbMemory) -> None:
    user_ids, rows = make_rows(2, 3)
    store.save(user_ids, rows)
    found = store.fetch(np.array([0, 1]), 3)
    found.rows["memory"] = -1  # writable, so that tensors can be made of it without a warning
    assert (store.fetch(np.array([0, 1]), 3).rows["memory"] >= 0).all()


def test_nothing_to_fetch_is_an_empty_answer(store: LmdbMemory) -> None:
    nobody = store.fetch(np.empty(0, np.int64), 5)
    assert len(nobody.rows) == 0
    assert nobody.offsets.tolist() == [0]
    assert nobody.rows.dtype == NAMESPACE.row_dtype
    unknown = store.fetch(np.array([4, 5]), 5, np.array([0, 0]))
    assert unknown.offsets.tolist() == [0, 0, 0]
    store.save(np.empty(0, np.int64), np.empty(0, NAMESPACE.row_dtype)).wait()
    assert store.stats().rows == 0


def test_bad_arguments_are_refused_and_store_nothing(store: LmdbMemory) -> None:
    user_ids, rows = make_rows(2, 3)
    with pytest.raises(ValueError, match="n must be at least 0"):
        store.fetch(user_ids, -1)
    with pytest.raises(ValueError, match="one user id per row"):
        store.save(user_ids[:-1], rows)
    other = np.zeros(len(user_ids), Namespace(dim=8).row_dtype)
    with pytest.raises(NamespaceMismatchError, match=NAMESPACE.name):
        store.save(user_ids, other)
    assert store.stats().rows == 0


def test_a_directory_of_another_namespace_is_refused(tmp_path: Path) -> None:
    LmdbMemory(tmp_path, NAMESPACE).close()
    with pytest.raises(NamespaceMismatchError, match="ranking-l4-d32"):
        LmdbMemory(tmp_path, Namespace(depth=4))
    with pytest.raises(NamespaceMismatchError, match="raise the namespace's epoch"):
        LmdbMemory(tmp_path, Namespace(epoch=1), readonly=True)
    LmdbMemory(tmp_path, NAMESPACE).close()  # a refused opening leaves nothing open


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"not a store" * 1000)
    for readonly in (True, False):
        with pytest.raises(MemoryStoreError, match="replay the event log"):
            LmdbMemory(tmp_path, NAMESPACE, readonly=readonly)
    assert (tmp_path / "data.mdb").read_bytes() == b"not a store" * 1000


def test_a_reader_needs_a_store(tmp_path: Path) -> None:
    with pytest.raises(MemoryStoreAbsentError, match="no memory store"):
        LmdbMemory(tmp_path / "nowhere", NAMESPACE, readonly=True)
    assert not (tmp_path / "nowhere").exists()


def test_a_reader_cannot_save(tmp_path: Path) -> None:
    LmdbMemory(tmp_path, NAMESPACE).close()
    reader = LmdbMemory(tmp_path, NAMESPACE, readonly=True)
    with pytest.raises(MemoryStoreError, match="open for reading"):
        reader.save(*make_rows(1, 1))
    with pytest.raises(MemoryStoreError, match="close the reader first"):
        LmdbMemory(tmp_path, NAMESPACE)
    reader.close()


def test_a_reader_and_the_writer_of_one_process_share_the_store(
    store: LmdbMemory, tmp_path: Path
) -> None:
    reader = LmdbMemory(tmp_path / "store", NAMESPACE, readonly=True)
    user_ids, rows = make_rows(3, 4)
    store.save(user_ids, rows)
    assert len(reader.fetch(np.arange(3), 10).rows) == 12
    reader.close()
    assert len(store.fetch(np.arange(3), 10).rows) == 12


def test_a_full_store_grows_and_readers_in_other_processes_follow(
    tmp_path: Path, other_process: ProcessPoolExecutor
) -> None:
    store = LmdbMemory(tmp_path, NAMESPACE, map_size_bytes=1 << 16)
    users = np.arange(40)
    reference = InProcessMemory(NAMESPACE)
    for start in range(4):  # the other process has the store open since it was small
        user_ids, rows = make_rows(40, 150, start_ms=start * 6000)
        store.save(user_ids, rows)
        reference.save(user_ids, rows)
        expected = reference.fetch(users, 1000)
        there = other_process.submit(fetch_held, tmp_path, users, 1000).result(60)
        assert there == expected.rows.tobytes()
    fresh = other_process.submit(fetch_bytes, tmp_path / ".", users, 1000)
    assert fresh.exception(60) is None
    assert store.stats().rows == 4 * 40 * 150
    assert store.stats().stored_bytes >= 4 * 40 * 150 * NAMESPACE.row_dtype.itemsize
    store.close()


def test_a_store_at_its_limit_refuses_a_batch_as_a_whole(tmp_path: Path) -> None:
    store = LmdbMemory(tmp_path, NAMESPACE, map_size_bytes=1 << 16, max_map_size_bytes=1 << 18)
    user_ids, rows = make_rows(20, 10)
    store.save(user_ids, rows)
    before = store.fetch(np.arange(20), 1000).rows.tobytes()
    with pytest.raises(MemoryStoreError, match="reached its limit"):
        store.save(*make_rows(20, 500, start_ms=10**6))
    assert store.fetch(np.arange(20), 1000).rows.tobytes() == before
    assert store.stats().rows == 200
    store.save(*make_rows(20, 1, start_ms=10**6))
    assert store.stats().rows == 220
    store.close()


def test_a_row_limit_drops_the_oldest_pages(tmp_path: Path) -> None:
    store = LmdbMemory(tmp_path, NAMESPACE, max_rows_per_user=100)
    for start in range(30):
        store.save(*make_rows(2, 40, start_ms=start * 80))
    found = store.fetch(np.arange(2), 10**6)
    assert found.counts.tolist() == [100, 100]
    assert store.stats().rows <= 2 * (100 + 2 * PageLayout.of(NAMESPACE).rows_per_page)
    with pytest.raises(ValueError, match="max_rows_per_user"):
        LmdbMemory(tmp_path / "other", NAMESPACE, max_rows_per_user=0)
    store.close()


def test_threads_read_whole_saves_while_one_writes(tmp_path: Path) -> None:
    store = LmdbMemory(tmp_path, NAMESPACE, map_size_bytes=1 << 16)
    users = np.arange(8)
    store.save(*make_rows(8, 30, step=0))
    num_saves, num_readers = 14, 2
    # A few reads are let go beside every save: readers that spin would starve the writer.
    turns = threading.Semaphore(0)

    def write() -> None:
        for step in range(1, num_saves + 1):  # rewrites every row, and grows the map on the way
            user_ids, rows = make_rows(8, 30, step=step)
            extra_ids, extra = make_rows(8, 5, start_ms=1000 * step, step=RAW_STEP)
            turns.release(2 * num_readers)
            store.save(np.concatenate([user_ids, extra_ids]), np.concatenate([rows, extra]))

    def read() -> None:
        for _ in range(2 * num_saves):
            assert turns.acquire(timeout=120)
            found = store.fetch(users, 30, np.full(8, 240))
            assert len(set(found.rows["written_step"].tolist())) == 1
            assert found.counts.tolist() == [30] * 8

    with ThreadPoolExecutor(num_readers + 1) as pool:
        running = [pool.submit(write), *(pool.submit(read) for _ in range(num_readers))]
        for future in running:
            future.result()
    store.close()
