"""One task of a rebuild against a real log: what it writes, and what it leaves alone."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rebuild_samples import (
    STEP,
    SmallPool,
    Streamed,
    frozen_weights,
    namespace,
    sample_history,
    streamed,
)

from cache_actors.event_log.erase import erase_user
from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.store.shard_store import ShardStore
from marm.addressing import NUM_BUCKETS
from marm.memory import RAW_STEP, UserRows
from marm.sequence import raw_rows
from train.rebuild import rebuilder
from train.rebuild.log_part import events_before
from train.rebuild.rebuilder import Rebuilder, TaskReport
from train.rebuild.stored import DueRule, LayeredMemory

WEIGHTS = frozen_weights(history_length=5)
USERS = np.arange(1, 8)
OUTDATED = DueRule(STEP, STEP)
MISSING = DueRule(STEP, 0)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Streamed:
    """A log, and the memory that streaming with `WEIGHTS` made of it."""
    monkeypatch.setattr(rebuilder, "GROUP_EVENTS", 100)
    monkeypatch.setattr(rebuilder, "SAVE_ROWS", 64)
    return streamed(tmp_path / "log", WEIGHTS, sample_history())


def rebuild(
    log: EventLog,
    memory: LayeredMemory,
    rule: DueRule = OUTDATED,
    users: NDArray[np.int64] = USERS,
    newest: int | None = None,
    end: LogOffsets = WEIGHTS.log_end,
) -> TaskReport:
    batches = events_before(log, end, np.arange(NUM_BUCKETS))
    return Rebuilder(WEIGHTS, memory, rule, newest).rebuild(batches, users)


def everything(memory: SmallPool) -> UserRows:
    return memory.fetch(USERS, 10_000)


def assert_same_rows(first: UserRows, second: UserRows, ignore_age: bool = True) -> None:
    assert first.offsets.tolist() == second.offsets.tolist()
    assert first.rows.dtype.names is not None
    for name in first.rows.dtype.names:
        if name == "memory":
            np.testing.assert_allclose(first.rows[name], second.rows[name], rtol=1e-5, atol=1e-5)
        elif not (ignore_age and name.startswith("written_")):
            np.testing.assert_array_equal(first.rows[name], second.rows[name], err_msg=name)


def test_a_lost_memory_is_rebuilt_as_training_left_it(trained: Streamed) -> None:
    memory = SmallPool(WEIGHTS.config.namespace)
    report = rebuild(trained.log, memory)
    assert_same_rows(everything(memory), everything(trained.memory))
    assert (everything(memory).rows["written_step"] == STEP).all()
    assert (everything(memory).rows["written_s"] > 1_600_000_000).all()
    assert report == TaskReport(7, 400, 7, 400, 400)


def test_a_second_rebuild_finds_nothing_to_do(trained: Streamed) -> None:
    rebuild(trained.log, trained.memory)
    before = everything(trained.memory)
    assert rebuild(trained.log, trained.memory) == TaskReport(users=7, rows=400)
    assert everything(trained.memory).rows.tobytes() == before.rows.tobytes()


def test_a_rebuild_that_was_cut_short_continues(trained: Streamed) -> None:
    class CrashError(RuntimeError):
        pass

    class DyingMemory(SmallPool):
        saves_left = 2

        def save(self, user_ids: NDArray, rows: NDArray):  # type: ignore[no-untyped-def]
            if not self.saves_left:
                raise CrashError
            self.saves_left -= 1
            return super().save(user_ids, rows)

    memory = DyingMemory(WEIGHTS.config.namespace)
    with pytest.raises(CrashError):
        rebuild(trained.log, memory)
    written = len(everything(memory).rows)
    assert 0 < written < 400
    memory.saves_left = 100
    assert rebuild(trained.log, memory).rows_written == 400 - written
    assert_same_rows(everything(memory), everything(trained.memory))


def test_missing_and_raw_rows_alone_are_filled_in(trained: Streamed) -> None:
    """Lost rows come back exactly; rows that are there keep their bytes."""
    full = everything(trained.memory)
    rng = np.random.default_rng(0)
    lost, raw = rng.random(400) < 0.1, rng.random(400) < 0.1
    owners = np.repeat(full.user_ids, full.counts)
    rows = full.rows.copy()
    rows["memory"][raw], rows["written_step"][raw], rows["written_s"][raw] = 0, RAW_STEP, 0
    memory = SmallPool(WEIGHTS.config.namespace)
    memory.save(owners[~lost], rows[~lost])

    report = rebuild(trained.log, memory, MISSING)
    due = lost | raw
    assert report.rows_written == due.sum()
    after = everything(memory)
    assert_same_rows(after, full)
    assert after.rows[~due].tobytes() == full.rows[~due].tobytes()
    assert (after.rows["written_step"][due] == STEP).all()


def test_rows_newer_than_the_version_stay(trained: Streamed) -> None:
    full = everything(trained.memory)
    owners = np.repeat(full.user_ids, full.counts)
    newer = np.random.default_rng(1).random(400) < 0.3
    rows = full.rows[newer].copy()
    rows["written_step"], rows["memory"] = STEP + 1, 7.0
    trained.memory.save(owners[newer], rows)

    assert rebuild(trained.log, trained.memory).rows_written == 400 - newer.sum()
    after = everything(trained.memory)
    assert after.rows[newer].tobytes() == rows.tobytes()
    assert (after.rows["written_step"][~newer] == STEP).all()

    replace_newer = replace(OUTDATED, replace_newer=True)
    assert rebuild(trained.log, trained.memory, replace_newer).rows_written == newer.sum()
    assert_same_rows(everything(trained.memory), full)


def test_rows_younger_than_the_bound_stay(trained: Streamed) -> None:
    full = everything(trained.memory)
    report = rebuild(trained.log, trained.memory, DueRule(STEP, 5))
    old = full.rows["written_step"] < 5
    assert 0 < old.sum() < 400
    assert report.rows_written == old.sum()
    after = everything(trained.memory).rows
    np.testing.assert_array_equal(after["written_step"] == STEP, old)
    assert after[~old].tobytes() == full.rows[~old].tobytes()


def test_only_the_newest_rows_are_looked_after(trained: Streamed) -> None:
    memory = SmallPool(WEIGHTS.config.namespace, max_rows_per_user=9)
    report = rebuild(trained.log, memory, newest=9)
    counts = np.minimum(everything(trained.memory).counts, 9)
    assert everything(memory).counts.tolist() == counts.tolist()
    assert report.rows == report.rows_written == counts.sum()
    assert report.rows_computed < 400
    assert_same_rows(everything(memory), trained.memory.fetch(USERS, 9))
    assert rebuild(trained.log, memory, newest=9).rows_written == 0


def test_only_the_users_asked_for_are_rebuilt(trained: Streamed) -> None:
    memory = SmallPool(WEIGHTS.config.namespace)
    report = rebuild(trained.log, memory, users=np.array([5, 2, 777]))
    assert report.users == 2
    assert (everything(memory).counts > 0).tolist() == [u in (2, 5) for u in USERS.tolist()]


def test_events_after_the_version_are_left_to_training(trained: Streamed) -> None:
    reader = trained.log.reader(LogOffsets.start())
    reader.next(250)
    end = reader.offsets
    later = reader.next(1000)
    assert later is not None
    memory = SmallPool(WEIGHTS.config.namespace)
    memory.save(later.user_id, raw_rows(later, memory.namespace.row_dtype))
    assert rebuild(trained.log, memory, end=end).rows_written == 250
    rows = everything(memory).rows
    is_later = np.isin(rows["event_key"], later.event_key)
    assert (rows["written_step"][is_later] == RAW_STEP).all()
    assert (rows["written_step"][~is_later] == STEP).all()


def test_a_forgotten_user_is_not_rebuilt(trained: Streamed, tmp_path: Path) -> None:
    erase_user(tmp_path / "log", 1, 1 << 60)
    memory = SmallPool(WEIGHTS.config.namespace)
    report = rebuild(EventLog(tmp_path / "log"), memory)
    assert report.users == 6
    assert everything(memory).counts[0] == 0


def test_what_a_store_was_told_to_forget_stays_forgotten(trained: Streamed, tmp_path: Path) -> None:
    """Also while the log still has the events: the store's own note keeps old rows away."""
    full = everything(trained.memory)
    middle_ms = int(np.median(full.of(1)["timestamp_ms"]))
    with closing(ShardStore(tmp_path / "store")) as store:
        memory = store.open(WEIGHTS.config.namespace)
        store.forget(1, 1 << 60)
        store.forget(2, middle_ms)
        rebuild(trained.log, memory)
        rows = memory.fetch(USERS, 10_000)
    assert len(rows.of(0)) == 0
    assert rows.of(1)["timestamp_ms"].min() > middle_ms
    assert rows.counts[2:].tolist() == full.counts[2:].tolist()
    np.testing.assert_allclose(rows.of(2)["memory"], full.of(2)["memory"], rtol=1e-5, atol=1e-5)


def test_another_namespace_is_refused(trained: Streamed) -> None:
    memory = SmallPool(namespace(epoch=3))
    with pytest.raises(ValueError, match="but the memory is ranking-l2-d8-float32-all-e3"):
        rebuild(trained.log, memory)
