"""Writers and readers that are killed at any moment, and readers that look on."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Semaphore

import numpy as np
import pytest
from stored_rows import ALL, OpenStore, are_proven, assert_same, proven_rows, series

from cache_actors.store import namespace_writer
from cache_actors.store.errors import MemoryFullError
from cache_actors.store.limits import StoreLimits
from cache_actors.store.lookup import UserState
from cache_actors.store.mapped_shard import MappedShard
from cache_actors.store.shard_store import ShardStore
from marm.addressing import combine64
from marm.memory import RAW_STEP, InProcessMemory, Namespace

NAMESPACE = Namespace(depth=2, dim=16)
NUM_USERS, NUM_KILLS, NUM_READERS = 60, 14, 2
USERS = np.arange(NUM_USERS)
DEADLINE_S = 60.0

Start = Callable[..., multiprocessing.Process]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes quickly; those still there are killed with the test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    started: list[multiprocessing.Process] = []

    def start_one(target: Callable[..., None], *arguments: object) -> multiprocessing.Process:
        process = context.Process(target=target, args=arguments, daemon=True)
        process.start()
        started.append(process)  # type: ignore[arg-type]
        return process  # type: ignore[return-value]

    yield start_one
    for process in started:
        process.kill()
        process.join(DEADLINE_S)


def kill(process: multiprocessing.Process) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(DEADLINE_S)
    assert process.exitcode == -signal.SIGKILL


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)


def append_for_ever(directory: Path, seed: int, ledger: Connection) -> None:
    """Save rows, some of them late or repeated, and note in the ledger what was acknowledged."""
    store = ShardStore(directory)
    rng = np.random.default_rng(seed)
    newest = 1000 * seed
    while True:
        users = rng.integers(0, NUM_USERS, rng.integers(1, 60))
        times = newest + rng.integers(0, 40, len(users))
        if rng.random() < 0.3:
            times = rng.integers(0, newest + 1, len(users))
        newest += 10
        store.save(NAMESPACE, users, proven_rows(NAMESPACE, users, times))
        ledger.send_bytes(json.dumps([users.tolist(), times.tolist()]).encode())


def watch_until(directory: Path, seed: int, stop: Path, report: Path) -> None:
    """Read random users until ``stop`` appears; report what was wrong with what was read."""
    held = MappedShard(directory).open(NAMESPACE)
    rng = np.random.default_rng(seed)
    most = dict.fromkeys(USERS.tolist(), 0)
    problems: list[str] = []
    reads = 0
    out = np.zeros(5000, NAMESPACE.row_dtype)
    while not stop.exists() and not problems:
        users = rng.permutation(USERS)[: rng.integers(1, 20)]
        found = held.lookup(users, ALL)
        if not are_proven(NAMESPACE, found.rows):
            problems.append("a wrong row")
        if (found.state == UserState.DAMAGED).any():
            problems.append("a damaged row")
        for index, user in enumerate(users.tolist()):
            rows = found.rows.of(index)
            if len(rows) < most[user]:
                problems.append(f"user {user} had {most[user]} rows and has {len(rows)}")
            most[user] = len(rows)
            if not (np.diff(rows["timestamp_ms"]) > 0).all():
                problems.append("rows out of order")
        user = int(users[0])
        count = held.fetch_into(user, 50, out)
        alone = combine64(np.full(count, user), out["timestamp_ms"][:count], np.ones(count, int))
        if not (out["event_key"][:count] == alone).all():
            problems.append("a wrong row of one user")
        if count < min(50, most[user]):
            problems.append("rows of one user are missing")
        reads += 1
        time.sleep(0.005)  # readers that spin would starve the writers
    report.write_text(json.dumps({"reads": reads, "problems": problems}))


def read_ledger(ledger: Connection, acknowledged: list[set[int]], most: int | None) -> None:
    """Note acknowledged rows: ``most`` batches, or all there are of a writer that is gone."""
    count = 0
    while most is None or count < most:
        try:
            users, times = json.loads(ledger.recv_bytes())
        except (EOFError, OSError):
            assert most is None, "the writer ended by itself"
            return
        for user, timestamp in zip(users, times, strict=True):
            acknowledged[user].add(timestamp)
        count += 1


def check_acknowledged(directory: Path, acknowledged: list[set[int]]) -> None:
    store = ShardStore(directory)
    held = store.open(NAMESPACE)
    found = held.lookup(USERS, ALL)
    assert are_proven(NAMESPACE, found.rows)
    assert set(found.state.tolist()) <= {UserState.FOUND, UserState.ABSENT}
    for user in USERS.tolist():
        missing = acknowledged[user] - set(found.rows.of(user)["timestamp_ms"].tolist())
        assert not missing
    assert held.stats().rows == len(found.rows.rows)
    store.close()


def test_killed_writers_lose_no_acknowledged_row_and_readers_see_no_wrong_one(
    tmp_path: Path, start: Start
) -> None:
    directory, stop = tmp_path / "shard", tmp_path / "stop"
    reports = [tmp_path / f"reader-{index}" for index in range(NUM_READERS)]
    store = ShardStore(directory)
    store.open(NAMESPACE)
    store.close()
    for index, report in enumerate(reports):
        start(watch_until, directory, index, stop, report)
    acknowledged: list[set[int]] = [set() for _ in range(NUM_USERS)]
    rng = np.random.default_rng(0)
    for seed in range(1, NUM_KILLS + 1):
        ledger, theirs = multiprocessing.get_context("forkserver").Pipe(duplex=False)
        writer = start(append_for_ever, directory, seed, theirs)
        theirs.close()
        read_ledger(ledger, acknowledged, int(rng.integers(0, 12)))
        kill(writer)
        read_ledger(ledger, acknowledged, None)
        if seed % 5 == 0:
            check_acknowledged(directory, acknowledged)
    check_acknowledged(directory, acknowledged)
    stop.touch()
    for report in reports:
        wait_for(report)
        deadline = time.monotonic() + DEADLINE_S
        while not (text := report.read_text()):
            assert time.monotonic() < deadline
        seen = json.loads(text)
        assert seen["problems"] == []
        assert seen["reads"] > 0


def read_for_ever(directory: Path, is_reading: Path) -> None:
    """Be inside one read until somebody ends it."""
    shard = MappedShard(directory)
    shard.open(NAMESPACE)

    def stay(transaction: object) -> None:
        is_reading.touch()
        while True:
            time.sleep(60)

    shard._env.read(stay)


def save_user(store: ShardStore, user: int) -> None:
    users, times = np.full(100, user), np.arange(100)
    store.save(NAMESPACE, users, proven_rows(NAMESPACE, users, times))


def test_a_reader_that_dies_inside_a_read_blocks_no_place(
    open_store: OpenStore, tmp_path: Path, start: Start
) -> None:
    store = open_store(limits=StoreLimits(max_bytes=4 << 20))
    save_user(store, 0)
    reader = start(read_for_ever, store.directory, tmp_path / "reading")
    wait_for(tmp_path / "reading")
    kill(reader)
    held = store.open(NAMESPACE)
    for user in range(1, 600):  # 7 MB
        save_user(store, user)
    assert held.stats().counters.evictions > 0
    assert store.stats().file_bytes <= 4 << 20


def test_without_a_budget_too_places_are_used_again_after_a_reader_died(
    open_store: OpenStore, tmp_path: Path, start: Start
) -> None:
    store = open_store()
    for user in range(20):
        save_user(store, user)
    held = store.open(NAMESPACE)
    reader = start(read_for_ever, store.directory, tmp_path / "reading")
    wait_for(tmp_path / "reading")
    kill(reader)
    for turn in range(300):  # each rewrites a user
        save_user(store, turn % 20)
    assert held.allocator.resting_rows <= 20 * 256
    places = held._file.places
    for turn in range(600):
        save_user(store, turn % 20)
    assert held._file.places == places


def save_until_refused(store: ShardStore, user: int) -> tuple[int, str]:
    """Save users from ``user`` on; the one for whom there was no room, and why."""
    while True:
        try:
            save_user(store, user)
        except MemoryFullError as error:
            return user, str(error)
        user += 1


def test_a_reader_that_holds_on_costs_a_full_store_one_save(
    open_store: OpenStore, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(limits=StoreLimits(max_bytes=4 << 20))
    held = store.open(NAMESPACE)
    user = 0
    while not held.stats().counters.evictions:
        save_user(store, user)
        user += 1
    while True:  # until nothing is free
        reserve = held.allocator.free_rows
        if reserve < 128:
            break
        save_user(store, user)
        user += 1
    monkeypatch.setattr(namespace_writer, "_READER_PATIENCE_S", 0.05)
    reader = start(read_for_ever, store.directory, tmp_path / "reading")
    wait_for(tmp_path / "reading")
    failed, reason = save_until_refused(store, user)
    assert "a reader held freed rows" in reason
    assert held.lookup(np.array([failed]), ALL).state.tolist() == [UserState.ABSENT]
    kill(reader)
    save_user(store, failed)
    assert held.fetch(np.array([failed]), ALL).counts.tolist() == [100]


def test_threads_read_whole_saves_while_one_writes(open_store: OpenStore) -> None:
    store = open_store()
    held = store.open(NAMESPACE)
    users = np.arange(8)
    store.save(NAMESPACE, *series(NAMESPACE, 8, 30, step=0))
    num_saves, num_readers = 40, 2
    # A few reads are let go beside every save: readers that spin would starve the writer.
    turns = Semaphore(0)

    def write() -> None:
        try:
            for step in range(1, num_saves + 1):  # rewrites every row
                turns.release(2 * num_readers)
                save_step(step)
        finally:
            turns.release(2 * num_saves * num_readers)  # whatever happens, nobody waits

    def save_step(step: int) -> None:
        user_ids, rows = series(NAMESPACE, 8, 30, step=step)
        rows["event_key"] = rows["timestamp_ms"]
        extra_ids, extra = series(NAMESPACE, 8, 5, start_ms=1000 * step, step=RAW_STEP)
        extra["memory"] = 0
        both = np.concatenate([user_ids, extra_ids])
        store.save(NAMESPACE, both, np.concatenate([rows, extra]))

    def read() -> None:
        for turn in range(2 * num_saves):
            assert turns.acquire(timeout=DEADLINE_S)
            some = users[: 3 + turn % 6]
            found = held.lookup(some, 30, np.full(len(some), 240))
            assert set(found.state.tolist()) == {UserState.FOUND}
            assert len(set(found.rows.rows["written_step"].tolist())) == 1

    first, rows = series(NAMESPACE, 8, 30, step=0)
    rows["event_key"] = rows["timestamp_ms"]
    store.drop(NAMESPACE)
    store.save(NAMESPACE, first, rows)
    with ThreadPoolExecutor(num_readers + 1) as pool:
        running = [pool.submit(write), *(pool.submit(read) for _ in range(num_readers))]
        for future in running:
            future.result()


_held: dict[Path, MappedShard] = {}


def fetch_held(directory: Path, users: np.ndarray) -> tuple[bytes, list[int]]:
    """Fetch through a reader that stays open from call to call."""
    if directory not in _held:
        _held[directory] = MappedShard(directory)
    found = _held[directory].open(NAMESPACE).fetch(users, ALL)
    return found.rows.tobytes(), found.offsets.tolist()


def test_readers_in_other_processes_follow_a_store_that_grows(
    open_store: OpenStore, other_process: object
) -> None:
    store, reference = open_store(), InProcessMemory(NAMESPACE)
    for start_ms in range(0, 60_000, 15_000):  # the other process has it open since it was small
        user_ids, rows = series(NAMESPACE, NUM_USERS, 250, start_ms=start_ms)
        store.save(NAMESPACE, user_ids, rows)
        reference.save(user_ids, rows)
        expected = reference.fetch(USERS, ALL)
        there = other_process.submit(fetch_held, store.directory, USERS)  # type: ignore[attr-defined]
        assert there.result(DEADLINE_S) == (expected.rows.tobytes(), expected.offsets.tolist())
    assert_same(store.open(NAMESPACE).fetch(USERS, ALL), reference.fetch(USERS, ALL))
