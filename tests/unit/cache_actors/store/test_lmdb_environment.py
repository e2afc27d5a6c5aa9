"""LMDB's rules: one environment per directory and process, and a map that grows."""

from __future__ import annotations

import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from cache_actors.store import lmdb_environment
from cache_actors.store.errors import MemoryFullError, MemoryStoreAbsentError, MemoryStoreError
from cache_actors.store.lmdb_environment import LmdbEnvironment, open_environment

TABLE = b"things"
SMALL_BYTES = 1 << 16


def put(env: LmdbEnvironment, start: int, count: int, size: int = 500) -> None:
    table = env.table(TABLE)

    def change(transaction: object) -> None:
        for index in range(start, start + count):
            value = index.to_bytes(4, "big") * (size // 4)
            transaction.put(index.to_bytes(4, "big"), value, db=table)  # type: ignore[attr-defined]

    env.write(change)


def keys(env: LmdbEnvironment) -> list[int]:
    table = env.table(TABLE)
    return env.read(
        lambda t: [int.from_bytes(k, "big") for k in t.cursor(table).iternext(values=False)]
    )


_held: dict[Path, LmdbEnvironment] = {}


def count_held(path: Path) -> int:
    """Count keys through a reader that stays open from call to call."""
    if path not in _held:
        _held[path] = open_environment(path, readonly=True)
    return len(keys(_held[path]))


def test_a_full_map_grows_and_readers_in_other_processes_follow(
    tmp_path: Path, other_process: ProcessPoolExecutor
) -> None:
    env = open_environment(tmp_path, readonly=False, map_bytes=SMALL_BYTES)
    for start in range(0, 800, 200):  # the other process has it open since it was small
        put(env, start, 200)
        assert len(keys(env)) == start + 200
        assert other_process.submit(count_held, tmp_path).result(60) == start + 200
    assert env.env.info()["map_size"] > SMALL_BYTES
    env.close()


def test_a_map_at_its_limit_refuses_a_change_as_a_whole(tmp_path: Path) -> None:
    env = open_environment(
        tmp_path, readonly=False, map_bytes=SMALL_BYTES, max_map_bytes=4 * SMALL_BYTES
    )
    put(env, 0, 100)
    with pytest.raises(MemoryFullError, match="reached its limit"):
        put(env, 100, 1000)
    assert keys(env) == list(range(100))
    put(env, 100, 1)
    assert len(keys(env)) == 101
    env.close()


def test_a_directory_is_opened_once_per_process(tmp_path: Path) -> None:
    writer = open_environment(tmp_path, readonly=False)
    put(writer, 0, 3)
    reader = open_environment(tmp_path / ".", readonly=True)
    assert reader is writer
    reader.close()
    assert keys(writer) == [0, 1, 2]
    writer.close()
    reader = open_environment(tmp_path, readonly=True)
    assert reader is not writer
    with pytest.raises(MemoryStoreError, match="close the reader first"):
        open_environment(tmp_path, readonly=False)
    with pytest.raises(MemoryStoreError, match="could not be stored"):
        put(reader, 3, 1)
    with pytest.raises(MemoryStoreAbsentError, match="let its writer make it first"):
        reader.table(b"other")
    reader.close()
    with pytest.raises(MemoryStoreError, match="cannot be read"):
        reader.read(lambda transaction: transaction.stat())


def test_threads_read_while_the_map_grows(tmp_path: Path) -> None:
    env = open_environment(tmp_path, readonly=False, map_bytes=SMALL_BYTES)
    put(env, 0, 10)
    is_done = threading.Event()

    def read() -> int:
        most = 0
        while True:
            is_last = is_done.is_set()
            found = keys(env)
            assert found == list(range(len(found)))
            assert len(found) >= most
            most = len(found)
            if is_last:
                return most
            is_done.wait(0.002)

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for start in range(10, 1010, 100):
                put(env, start, 100)
        finally:
            is_done.set()
        assert [reader.result(60) for reader in readers] == [1010, 1010]
    env.close()


def test_the_oldest_reader_is_known(tmp_path: Path) -> None:
    env = open_environment(tmp_path, readonly=False)
    put(env, 0, 1)
    assert env.oldest_reader() is None
    seen: list[int | None] = []

    def read(transaction: object) -> int:
        before = transaction.id()  # type: ignore[attr-defined]
        put(env, 1, 1)
        seen.append(env.oldest_reader())
        return before

    assert [env.read(read)] == seen
    assert env.oldest_reader() is None
    env.forget_dead_readers()
    env.close()


def test_too_many_readers_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_environment, "MAX_READERS", 2)
    env = open_environment(tmp_path, readonly=False)
    env.table(TABLE)

    def read(depth: int) -> None:
        env.read(lambda transaction: read(depth - 1) if depth else None)

    with pytest.raises(MemoryStoreError, match="at most 2 reads may run"):
        read(3)
    read(1)
    env.close()
