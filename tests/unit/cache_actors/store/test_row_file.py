"""The files of rows: growth, full disks, and files that are not what the index says."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from stored_rows import ALL, are_proven, proven_rows, series

from cache_actors.store.errors import MemoryFullError, MemoryStoreAbsentError, MemoryStoreError
from cache_actors.store.mapped_shard import MappedShard
from cache_actors.store.row_file import PlaceRuns, RowFile, row_checks
from cache_actors.store.shard_store import ShardStore
from marm.memory import Namespace

NAMESPACE = Namespace()
MOUNT_PROGRAM = """
import sys
from pathlib import Path
from test_row_file import save_until_full
where = Path(sys.argv[1])
assert "cannot grow" in save_until_full(where / "shard"), "the disk was never full"
"""


def test_a_file_grows_in_chunks_and_mappings_stay_valid(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows", NAMESPACE.stored_dtype, readonly=False)
    assert file.mapped.capacity == 0
    assert file.growth(128, 1) % 128 == 0
    assert file.growth(128, 5000) >= 5000
    file.grow(128)
    rows = proven_rows(NAMESPACE, np.full(128, 5), np.arange(128))
    file.write(PlaceRuns(np.array([0]), np.array([128]), np.array([True])), rows, np.full(128, 5))
    early = file.mapped
    file.grow(1024)
    assert file.places == 1152
    assert file.mapped.capacity >= 1152
    assert early.opaque[:128].tobytes() == rows.tobytes() == file.mapped.opaque[:128].tobytes()
    assert file.mapped.times[:128].tolist() == list(range(128))
    reader = RowFile(tmp_path / "rows", NAMESPACE.stored_dtype, readonly=True)
    assert reader.at_least(128).checks[:128].tolist() == early.checks[:128].tolist()
    used = 1152 * (NAMESPACE.stored_dtype.itemsize + 8)
    assert used <= file.file_bytes <= used + 16384
    reader.close()
    file.close()


def test_sums_of_checks_tell_the_checks_of_any_run(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows", NAMESPACE.stored_dtype, readonly=False)
    file.grow(128)
    owners = np.array([7, -3]).repeat(32)
    rows = proven_rows(NAMESPACE, owners, np.arange(64))
    yes, no = np.array([True, True]), np.array([False, False])
    # Two extents side by side, each written in two parts and the parts of both together.
    parts = [(0, 10, yes), (10, 22, no)]
    for first, length, begins in parts:
        runs = PlaceRuns(np.array([32 + first, 64 + first]), np.array([length, length]), begins)
        mine = runs.places - 32
        file.write(runs, rows.view(f"V{rows.itemsize}")[mine].view(rows.dtype), owners[mine])
    expected = row_checks(file.mapped.words[32:96], owners)
    for first, end in ((32, 64), (33, 64), (40, 41), (32, 33), (64, 96), (64, 70), (95, 96)):
        begins = np.array([first in (32, 64)])
        run = PlaceRuns(np.array([first]), np.array([end - first]), begins)
        own = expected[first - 32 : end - 32]
        assert file.mapped.checks_of(run).tolist() == own.tolist()
        assert file.mapped.sums_of(run).tolist() == [own.sum()]
    none = PlaceRuns(np.array([40, 64]), np.array([0, 0]), np.array([False, True]))
    assert file.mapped.sums_of(none).tolist() == [0, 0]
    assert len(file.mapped.checks_of(none)) == 0
    file.close()


def test_a_reader_follows_a_file_that_grows(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows", NAMESPACE.stored_dtype, readonly=False)
    reader = RowFile(tmp_path / "rows", NAMESPACE.stored_dtype, readonly=True)
    for _ in range(6):
        file.grow(1024)
        assert reader.at_least(file.places).capacity >= file.places
    with pytest.raises(MemoryStoreError, match="not the file that belongs to its index"):
        reader.at_least(file.mapped.capacity + 1)
    reader.close()
    file.close()


def test_reserved_blocks_are_used_after_opening_again(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows", NAMESPACE.stored_dtype, readonly=False)
    file.grow(4096)
    file.close()
    again = RowFile(tmp_path / "rows", NAMESPACE.stored_dtype, readonly=False)
    again.keep_reserved(300, 128)
    assert again.places == 4096
    again.close()


def test_a_reader_needs_files_and_a_writer_says_what_it_cannot_open(tmp_path: Path) -> None:
    with pytest.raises(MemoryStoreAbsentError, match="open the namespace first"):
        RowFile(tmp_path / "rows", NAMESPACE.stored_dtype, readonly=True)
    assert not list(tmp_path.iterdir())
    (tmp_path / "rows.rows").mkdir()
    with pytest.raises(MemoryStoreError, match="cannot be opened"):
        RowFile(tmp_path / "rows", NAMESPACE.stored_dtype, readonly=False)


def save_until_full(directory: Path, most_rows: int = 400_000) -> str:
    """Save until it fails; what the failure said. Everything acknowledged is there afterwards."""
    store = ShardStore(directory)
    saved, message = 0, ""
    while saved < most_rows:
        times = np.arange(saved, saved + 2000)
        users = times % 10
        try:
            store.save(NAMESPACE, users, proven_rows(NAMESPACE, users, times))
        except MemoryFullError as error:
            message = str(error)
            break
        saved += 2000
    held = store.open(NAMESPACE)
    found = held.fetch(np.arange(10), ALL)
    assert len(found.rows) == saved == held.stats().rows
    assert are_proven(NAMESPACE, found)
    # What fits in place is still taken, and a failed save changed nothing.
    with_room = int(np.argmin(found.counts % 128))
    version = held.fetch(np.array([with_room]), 1).rows["timestamp_ms"][0]
    assert version < saved
    return message


def _save_with_small_files(directory: Path, most_bytes: int, answer: Connection) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    answer.send(save_until_full(directory))


def in_process(target: Callable[..., None], *arguments: object) -> object:
    context = get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, there))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join(60)
        assert process.exitcode == 0


def test_a_file_that_may_not_grow_refuses_the_batch_and_keeps_the_rest(
    tmp_path: Path,
) -> None:
    message = in_process(_save_with_small_files, tmp_path / "shard", 3 << 20)
    assert "cannot grow" in str(message)
    assert "nothing of this batch was stored" in str(message)
    store = ShardStore(tmp_path / "shard")  # without the limit it goes on
    held = store.open(NAMESPACE).stats().rows
    users, rows = series(NAMESPACE, 10, 300, start_ms=10**7)
    store.save(NAMESPACE, users, rows)
    assert store.open(NAMESPACE).stats().rows == held + 3000
    store.close()


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs to mount a small disk"
)
def test_a_full_disk_ends_no_process(tmp_path: Path) -> None:
    probe = ["unshare", "-m", "sh", "-c", f"mount -t tmpfs -o size=64k tmpfs {tmp_path}"]
    if subprocess.run(probe, check=False, capture_output=True).returncode:
        pytest.skip("may not mount here")
    mount = f"mount -t tmpfs -o size=3m tmpfs {tmp_path}"
    program = f"{mount} && exec {sys.executable} -c '{MOUNT_PROGRAM}' {tmp_path}"
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parents[2]), str(here.parents[3])])
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", program],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def damage_file(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("content", [None, b"", b"something else", bytes(100)])
@pytest.mark.parametrize("suffix", [".rows", ".checks"])
def test_files_too_short_for_their_index_are_refused(
    tmp_path: Path, suffix: str, content: bytes | None
) -> None:
    store = ShardStore(tmp_path)
    store.save(NAMESPACE, *series(NAMESPACE, 3, 200))
    store.close()
    (path,) = tmp_path.glob(f"*{suffix}")
    damage_file(path, content)
    index = (tmp_path / "data.mdb").read_bytes()
    if content is not None:
        mapped = MappedShard(tmp_path)
        with pytest.raises(MemoryStoreError, match="replay the event log"):
            mapped.open(NAMESPACE).fetch(np.arange(3), 10)
        mapped.close()
    with pytest.raises(MemoryStoreError, match="replay the event log"):
        ShardStore(tmp_path)
    assert (tmp_path / "data.mdb").read_bytes() == index


def test_a_foreign_file_of_the_right_size_gives_no_rows(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    store.save(NAMESPACE, *series(NAMESPACE, 3, 200))
    store.close()
    (path,) = tmp_path.glob("*.rows")
    rng = np.random.default_rng(0)
    path.write_bytes(rng.bytes(path.stat().st_size))
    store = ShardStore(tmp_path)
    held = store.open(NAMESPACE)
    assert len(held.fetch(np.arange(3), ALL).rows) == 0
    assert len(held.fetch(np.arange(3), ALL, np.arange(100, 103)).rows) == 0
    store.close()
