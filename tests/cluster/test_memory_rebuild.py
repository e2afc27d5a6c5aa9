"""Rebuild and audit of a real pool, with real training, on a real Ray."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from cache_actors.event_log.erase import erase_user
from cache_actors.home import Home
from cache_actors.pool.client import MemoryClient
from cache_actors.pool.lifecycle import start_pool, stop_pool
from cache_actors.pool.shard_link import PoolInfo
from cache_actors.registry import ModelRegistry, ModelRegistryError
from marm.config import ModelConfig
from marm.memory import RAW_STEP, Namespace, UserRows
from train.config import TrainConfig
from train.data.world import write_world
from train.data.world_config import WorldConfig
from train.rebuild import plan
from train.rebuild.audit import audit_memory
from train.rebuild.log_job import RebuildError
from train.rebuild.rebuilder import TaskReport
from train.rebuild.request import AuditRequest, RebuildRequest
from train.rebuild.run import RebuildProgress, rebuild_memory
from train.run import run_training

pytestmark = pytest.mark.cluster

NUM_USERS, NUM_EVENTS = 60, 3_000
EVERYBODY = np.arange(1, NUM_USERS + 1)
NAMESPACE = Namespace(dtype="float32")
WORLD = WorldConfig(num_users=NUM_USERS, num_items=200, num_events=NUM_EVENTS)
CONFIG = TrainConfig(
    models=(ModelConfig(namespace=NAMESPACE, num_slots=1 << 12, history_length=20),),
    batch_size=32,
    evaluation_fraction=0.0,
    max_ahead_s=None,  # the second simulated log may lie in the future
)


@dataclass(frozen=True)
class Trained:
    """A home with a published model, and the pool that training filled."""

    home: Home
    pool: PoolInfo
    step: int

    def rows(self) -> UserRows:
        with MemoryClient(self.pool, NAMESPACE) as memory:
            return memory.fetch(EVERYBODY, NUM_EVENTS)


@pytest.fixture(scope="module")
def trained(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    home = Home(tmp_path_factory.mktemp("rebuild")).create()
    write_world(home, WORLD)
    pool = start_pool(home)
    try:
        yield Trained(home, pool, run_training(home, CONFIG).step)
    finally:
        stop_pool(pool)


@pytest.fixture
def empty_pool(trained: Trained) -> Iterator[PoolInfo]:
    """A second pool of the same home that has lost everything."""
    pool = start_pool(trained.home, name=f"lost-{uuid.uuid4().hex[:8]}")
    try:
        yield pool
    finally:
        stop_pool(pool)


def save(pool: PoolInfo, rows: UserRows, keep: np.ndarray) -> None:
    with MemoryClient(pool, NAMESPACE) as memory:
        owners = np.repeat(rows.user_ids, rows.counts)
        memory.save(owners[keep], rows.rows[keep]).wait(60)


def test_lost_rows_come_back_and_an_audit_sees_the_difference(
    trained: Trained, empty_pool: PoolInfo
) -> None:
    """In order: what training left is stale; a lost pool is rebuilt, which an audit confirms."""
    sample = AuditRequest(num_users=30, num_workers=2)
    stale = audit_memory(trained.home, sample, trained.pool)
    assert stale.step == trained.step
    assert stale.counts.users == 30
    assert stale.counts.missing_rows == stale.counts.raw_rows == 0
    assert [layer.layer for layer in stale.layers] == [1, 2]
    assert stale.layers[0].error_p50 > 0.01
    assert sum(age.rows for age in stale.by_steps) == stale.counts.rows
    assert sum(age.rows for age in stale.by_seconds) == stale.counts.rows
    oldest, newest = stale.by_steps[-1].layers[0], stale.by_steps[0].layers[0]
    assert oldest.error_mean > newest.error_mean

    missing = audit_memory(trained.home, sample, empty_pool)
    assert missing.counts.users_without_rows == 30
    assert missing.to_dict()["counts"]["missing_share"] == 1.0

    moments: list[RebuildProgress] = []
    request = RebuildRequest(num_workers=2)
    report = rebuild_memory(trained.home, request, empty_pool, moments.append)
    everything = TaskReport(NUM_USERS, NUM_EVENTS, NUM_USERS, NUM_EVENTS, NUM_EVENTS)
    assert report.done == moments[-1].report == everything
    assert moments[-1].events_done == moments[-1].events_total == NUM_EVENTS
    fresh = audit_memory(trained.home, sample, empty_pool)
    assert fresh.counts.rows == stale.counts.rows
    assert fresh.counts.missing_rows == fresh.counts.raw_rows == 0
    assert [age.below for age in fresh.by_steps] == [1]
    for layer in fresh.layers:
        assert layer.error_p95 < 1e-4
        assert layer.cosine_p05 > 1 - 1e-4
    again = rebuild_memory(trained.home, request, empty_pool)
    assert again.done == TaskReport(users=NUM_USERS, rows=NUM_EVENTS)


def test_lost_users_are_filled_in_and_the_others_keep_their_rows(
    trained: Trained, empty_pool: PoolInfo
) -> None:
    full = trained.rows()
    owners = np.repeat(full.user_ids, full.counts)
    lost = np.isin(owners, [3, 8])
    save(empty_pool, full, ~lost)
    request = RebuildRequest(older_than_steps=None, num_workers=1)
    report = rebuild_memory(trained.home, request, empty_pool)
    assert report.done.users_due == 2
    assert report.done.rows_written == lost.sum()
    with MemoryClient(empty_pool, NAMESPACE) as memory:
        rows = memory.fetch(EVERYBODY, NUM_EVENTS).rows
    np.testing.assert_array_equal(rows["written_step"] == trained.step, lost)
    assert rows[~lost].tobytes() == full.rows[~lost].tobytes()


def test_some_users_are_rebuilt(trained: Trained, empty_pool: PoolInfo) -> None:
    asked = RebuildRequest(user_ids=(5, 9, 10**15), newest=7)
    report = rebuild_memory(trained.home, asked, empty_pool)
    assert report.users_without_events == 1
    assert report.done.users == 2
    with MemoryClient(empty_pool, NAMESPACE) as memory:
        counts = memory.fetch(EVERYBODY, NUM_EVENTS).counts
    assert np.flatnonzero(counts).tolist() == [4, 8]
    assert counts.max() <= 7

    hottest = rebuild_memory(trained.home, RebuildRequest(limit_users=10), empty_pool)
    assert hottest.done.users == 10


def test_a_forgotten_user_does_not_come_back(
    trained: Trained, empty_pool: PoolInfo, tmp_path: Path
) -> None:
    home = Home(tmp_path).create()
    write_world(home, WORLD)
    newest = ModelRegistry(trained.home.models).load("ranking", "default", 1)
    ModelRegistry(home.models).publish("ranking", "default", newest.tensors, newest.config)
    erase_user(home.log, 7, 1 << 60)
    report = rebuild_memory(home, RebuildRequest(), empty_pool)
    assert report.done.users == NUM_USERS - 1
    with MemoryClient(empty_pool, NAMESPACE) as memory:
        assert len(memory.fetch(np.array([7]), 10).rows) == 0


def test_raw_rows_become_memorised(trained: Trained, empty_pool: PoolInfo) -> None:
    full = trained.rows()
    raw = UserRows(full.user_ids, full.offsets, full.rows.copy())
    raw.rows["memory"], raw.rows["written_s"], raw.rows["written_step"] = 0, 0, RAW_STEP
    save(empty_pool, raw, np.ones(len(raw.rows), np.bool_))
    audited = audit_memory(trained.home, AuditRequest(num_users=10), empty_pool)
    assert audited.counts.raw_rows == audited.counts.rows > 0
    report = rebuild_memory(trained.home, RebuildRequest(older_than_steps=None), empty_pool)
    assert report.done.rows_written == NUM_EVENTS


def test_what_cannot_be_done_is_a_clear_error(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(ModelRegistryError, match=r"no ranking model of variant 'other'"):
        rebuild_memory(trained.home, RebuildRequest(variant="other"), trained.pool)
    without_log = Home(tmp_path).create()
    published = ModelRegistry(trained.home.models).load("ranking", "default", 1)
    registry = ModelRegistry(without_log.models)
    registry.publish("ranking", "default", published.tensors, published.config)
    with pytest.raises(RebuildError, match="holds no events"):
        rebuild_memory(without_log, RebuildRequest(), trained.pool)


def test_a_failed_task_names_its_cause(trained: Trained) -> None:
    unreachable = replace(trained.pool, name="nowhere")
    with pytest.raises(RebuildError, match="is not running; start the pool; rows written so far"):
        rebuild_memory(trained.home, RebuildRequest(), unreachable)


def test_a_killed_worker_costs_no_row(
    trained: Trained, empty_pool: PoolInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "LEAST_TASK_EVENTS", 1)  # several tasks, also of a small log
    victims: list[int] = []

    def kill_once(progress: RebuildProgress) -> None:
        if not victims:
            victims.extend(rebuild_workers())
            for pid in victims:
                os.kill(pid, signal.SIGKILL)

    report = rebuild_memory(trained.home, RebuildRequest(), empty_pool, kill_once)
    assert victims
    assert report.tasks > 4
    with MemoryClient(empty_pool, NAMESPACE) as memory:
        rows = memory.fetch(EVERYBODY, NUM_EVENTS).rows
    assert len(rows) == NUM_EVENTS
    assert (rows["written_step"] == trained.step).all()


def rebuild_workers() -> list[int]:
    """Processes of this session's cluster that rebuild."""
    return [
        child.pid
        for child in psutil.Process().children(recursive=True)
        if "RebuildWorker" in " ".join(child.cmdline())
    ]


def test_training_and_a_rebuild_write_side_by_side(trained: Trained) -> None:
    """The rebuild refreshes what its version has learned from, training writes what is new; both
    end with exactly their rows. The last test here, since the home and its pool are changed."""
    learned = trained.rows().rows["event_key"]
    write_world(trained.home, replace(WORLD, seed=1, start_ms=WORLD.start_ms + 10**11))
    request = RebuildRequest(version=1, num_workers=2)
    with ThreadPoolExecutor(1) as executor:
        second = executor.submit(run_training, trained.home, CONFIG)
        written = rebuild_memory(trained.home, request, trained.pool).done.rows_written
        last_step = second.result().step
    rows = trained.rows().rows
    is_learned = np.isin(rows["event_key"], learned)
    assert written == len(learned) == is_learned.sum()
    assert len(rows) == 2 * NUM_EVENTS
    assert (rows["written_step"][is_learned] == trained.step).all()
    by_training = rows["written_step"][~is_learned]
    assert by_training.min() >= trained.step
    assert by_training.max() == last_step - 1
