"""Training through Ray Train and the real pool, with a worker killed on the way."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.home import Home
from cache_actors.pool.client import MemoryClient
from cache_actors.pool.lifecycle import start_pool, stop_pool
from cache_actors.registry import ModelRegistry
from marm.config import ModelConfig
from marm.memory import UserRows
from train.config import TrainConfig, three_stages
from train.data.world import write_world
from train.data.world_config import WorldConfig
from train.progress import Progress
from train.run import TrainingError, TrainingResult, run_training
from train.screening import TALLIES

pytestmark = pytest.mark.cluster

NUM_USERS, NUM_EVENTS = 60, 4_000
CONFIG = TrainConfig(
    models=three_stages(ModelConfig(num_slots=1 << 12, history_length=20)),
    batch_size=32,
    num_workers=2,
    checkpoint_every_steps=10,
    evaluation_fraction=1.0,
)


def make_home(path: Path) -> Home:
    home = Home(path).create()
    write_world(home, WorldConfig(num_users=NUM_USERS, num_items=200, num_events=NUM_EVENTS))
    return home


def worker_pids() -> list[int]:
    """Processes of the training workers of this session's cluster."""
    return [
        child.pid
        for child in psutil.Process().children(recursive=True)
        if "TrainWorker" in " ".join(child.cmdline())
    ]


class Killer:
    """Kills a training worker, once, as soon as the run has checkpoints behind it."""

    def __init__(self) -> None:
        self.victims: list[int] = []

    def __call__(self, progress: Progress) -> None:
        if not self.victims and progress.step > 2 * CONFIG.checkpoint_every_steps:
            self.victims = worker_pids()[:1]
            for pid in self.victims:
                os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    home: Home
    result: TrainingResult
    rows: UserRows


def train(home: Home, killer: Killer | None = None) -> Outcome:
    pool = start_pool(home, 2)
    try:
        result = run_training(home, CONFIG, on_progress=killer)
        with MemoryClient(pool, CONFIG.namespace) as memory:
            rows = memory.fetch(np.arange(1, NUM_USERS + 1), NUM_EVENTS)
        return Outcome(home, result, rows)
    finally:
        stop_pool(pool)


@pytest.fixture(scope="module")
def unbroken(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return train(make_home(tmp_path_factory.mktemp("unbroken")))


def test_a_killed_worker_resumes_exactly(unbroken: Outcome, tmp_path: Path) -> None:
    killer = Killer()
    killed = train(make_home(tmp_path), killer)
    assert len(killer.victims) == 1
    assert killed.result.screened == dict.fromkeys(TALLIES, 0)
    assert killed.result.log_problems == []
    assert killed.result.events_seen == unbroken.result.events_seen == NUM_EVENTS
    assert killed.result.step == unbroken.result.step
    assert killed.result.evaluation == unbroken.result.evaluation
    assert len(killed.rows.rows) == NUM_EVENTS
    for field in killed.rows.rows.dtype.names:
        if field != "written_s":  # the wall clock
            same = killed.rows.rows[field].tobytes() == unbroken.rows.rows[field].tobytes()
            assert same, field
    for stage in ("ranking", "cascading", "retrieval"):
        first, second = (
            ModelRegistry(outcome.home.models).latest_loadable(stage, "default")
            for outcome in (killed, unbroken)
        )
        assert first is not None
        assert second is not None
        for name, tensor in first.tensors.items():
            assert tensor.equal(second.tensors[name]), f"{stage}: {name}"


def test_tables_that_outgrow_memory_are_refused(unbroken: Outcome) -> None:
    models = tuple(replace(model, num_slots=1 << 40) for model in CONFIG.models)
    with pytest.raises(TrainingError, match=r"2 worker.* need .* are available; lower num_slots"):
        run_training(unbroken.home, replace(CONFIG, models=models), run_name="huge")


def test_a_later_run_continues_with_what_the_log_has_gained(unbroken: Outcome) -> None:
    home = unbroken.home
    more = WorldConfig(num_users=NUM_USERS, num_items=200, num_events=500, seed=1)
    write_world(home, more)
    second = train(home)
    assert second.result.events_seen == NUM_EVENTS + 500 == EventLog(home.log).num_events()
    assert second.result.versions == {"ranking": 2, "cascading": 2, "retrieval": 2}
    newest_ms = max(int(b.timestamp_ms.max()) for b in EventLog(home.log).read(LogOffsets.start()))
    version = ModelRegistry(home.models).config("ranking", "default", 2)
    assert version["newest_event_ms"] == newest_ms
    assert (second.rows.rows["written_step"] >= 0).all()


def test_an_empty_log_is_a_clear_error(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no events"):
        run_training(Home(tmp_path).create(), CONFIG)
