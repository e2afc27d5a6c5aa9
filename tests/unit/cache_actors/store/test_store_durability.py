"""What survives: the end of processes always, the end of the machine as asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stored_rows import ALL, OpenStore, assert_same, proven_rows, series

from cache_actors.store.limits import StoreLimits
from cache_actors.store.running_mark import RunningMark, boot_id
from cache_actors.store.shard_store import ShardStore
from marm.memory import Namespace

NAMESPACE = Namespace()
USERS = np.arange(5)


def crashed_copy(store: ShardStore, target: Path) -> Path:
    """The files as they would be found if the process ended now."""
    shutil.copytree(store.directory, target)
    return target


def test_a_store_whose_process_ended_has_everything(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store()
    store.save(NAMESPACE, *series(NAMESPACE, 5, 300))
    expected = store.open(NAMESPACE).fetch(USERS, ALL)
    crashed_copy(store, tmp_path / "copy")
    again = open_store("copy")
    assert not again.started_empty
    assert again.generation == store.generation
    assert_same(again.open(NAMESPACE).fetch(USERS, ALL), expected)


def test_a_store_that_the_machine_took_down_starts_empty(
    open_store: OpenStore, tmp_path: Path
) -> None:
    store = open_store()
    store.save(NAMESPACE, *series(NAMESPACE, 5, 300))
    copy = crashed_copy(store, tmp_path / "copy")
    (copy / "running").write_text("another boot")
    (copy / "notes.txt").write_text("mine")
    again = open_store("copy")
    assert again.started_empty
    assert again.generation != store.generation
    assert again.namespaces() == []
    assert len(again.open(NAMESPACE).fetch(USERS, ALL).rows) == 0
    again.save(NAMESPACE, *series(NAMESPACE, 5, 3))
    assert again.open(NAMESPACE).stats().rows == 15
    assert (copy / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("mark", ["", "\xff\xfe"])
def test_a_mark_cut_short_is_of_another_boot(
    open_store: OpenStore, tmp_path: Path, mark: str
) -> None:
    store = open_store()
    store.save(NAMESPACE, *series(NAMESPACE, 5, 3))
    copy = crashed_copy(store, tmp_path / "copy")
    (copy / "running").write_bytes(mark.encode("latin-1"))
    assert open_store("copy").started_empty


def test_what_was_flushed_outlives_the_machine(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store()
    store.save(NAMESPACE, *series(NAMESPACE, 5, 300))
    store.flush()
    copy = crashed_copy(store, tmp_path / "copy")
    assert not (copy / "running").exists()
    assert not open_store("copy").started_empty
    store.close()
    assert not (store.directory / "running").exists()


def changes() -> dict[str, Callable[[ShardStore], object]]:
    rows = proven_rows(NAMESPACE, np.array([1]), np.array([10**6]))

    def mark_saved(store: ShardStore) -> None:
        waiting = store.open(NAMESPACE).unsaved(10)
        store.mark_saved(NAMESPACE, waiting.rows.user_ids, waiting.versions)

    return {
        "save": lambda store: store.save(NAMESPACE, np.array([1]), rows),
        "restore": lambda store: store.restore(NAMESPACE, store.open(NAMESPACE).fetch(USERS, ALL)),
        "evict": lambda store: store.evict(NAMESPACE, USERS),
        "mark_saved": mark_saved,
        "repair": lambda store: store.repair(NAMESPACE, USERS),
        "forget": lambda store: store.forget(3, 10),
        "expire": lambda store: store.expire(2**32),
        "disown": lambda store: store.disown([3]),
        "delete_bucket": lambda store: [store.delete_bucket(bucket) for bucket in range(256)],
        "drop": lambda store: store.drop(NAMESPACE),
        "open": lambda store: store.open(Namespace(epoch=1)),
    }


@pytest.mark.parametrize("name", changes())
def test_every_change_sets_the_mark(open_store: OpenStore, name: str) -> None:
    store = open_store(limits=StoreLimits(ttl_s=10**6))
    store.track_unsaved = True
    store.save(NAMESPACE, *series(NAMESPACE, 5, 3))
    store.flush()
    mark = store.directory / "running"
    assert not mark.exists()
    store.open(NAMESPACE).fetch(USERS, ALL)
    store.touch(NAMESPACE, USERS.tolist())
    assert not mark.exists()
    changes()[name](store)
    assert mark.read_text() == boot_id()


def test_a_store_that_writes_everything_through_needs_no_mark(
    open_store: OpenStore, tmp_path: Path
) -> None:
    store = open_store(durability="machine")
    for start_ms in (0, 10**6):
        store.save(NAMESPACE, *series(NAMESPACE, 5, 300, start_ms=start_ms))
    store.forget(1, 10)
    store.evict(NAMESPACE, np.array([2]))
    assert not (store.directory / "running").exists()
    expected = store.open(NAMESPACE).fetch(USERS, ALL)
    crashed_copy(store, tmp_path / "copy")
    for durability in ("machine", "process", "machine"):
        again = open_store("copy", durability=durability)
        assert not again.started_empty
        assert_same(again.open(NAMESPACE).fetch(USERS, ALL), expected)
        again.close()


def test_a_mark_is_set_once_and_cleared(tmp_path: Path) -> None:
    mark = RunningMark(tmp_path / "running", is_needed=True)
    assert not mark.is_of_earlier_boot()
    mark.clear()
    mark.set()
    mark.set()
    assert not RunningMark(tmp_path / "running", is_needed=True).is_of_earlier_boot()
    mark.clear()
    assert list(tmp_path.iterdir()) == []
    RunningMark(tmp_path / "running", is_needed=False).set()
    assert list(tmp_path.iterdir()) == []
