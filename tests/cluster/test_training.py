"""Training through Ray Train and the real pool, with a worker killed on the way."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest

from cache_actors.client import MemoryClient
from cache_actors.event_log.log import EventLog
from cache_actors.home import Home
from cache_actors.pool import start_pool, stop_pool
from cache_actors.registry import ModelRegistry
from marm.config import ModelConfig
from marm.memory import UserRows
from train.config import TrainConfig, three_stages
from train.data.world import write_world
from train.data.world_config import WorldConfig
from train.progress import Progress
from train.run import TrainingError, TrainingResult, run_training

pytestmark = pytest.mark.cluster

NUM_USERS, NUM_EVENTS = 60, 6_000
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
        if not self.victims and progress.step > 3 * CONFIG.checkpoint_every_steps:
            self.victims = worker_pids()[:1]
            for pid in self.victims:
                os.kill(pid, signal.SIGKILL)


def train(home: Home, killer: Killer | None = None) -> tuple[TrainingResult, UserRows]:
    pool = start_pool(home, 2)
    try:
        result = run_training(home, CONFIG, on_progress=killer)
        with MemoryClient(pool, CONFIG.namespace) as memory:
            rows = memory.fetch(np.arange(1, NUM_USERS + 1), NUM_EVENTS)
        return result, rows
    finally:
        stop_pool(pool)


def test_a_killed_worker_resumes_exactly(ray_cluster: None, tmp_path: Path) -> None:
    unbroken_home, home = make_home(tmp_path / "unbroken"), make_home(tmp_path / "killed")
    killer = Killer()
    killed, rows = train(home, killer)
    unbroken, expected = train(unbroken_home)
    assert len(killer.victims) == 1
    assert killed.events_seen == unbroken.events_seen == NUM_EVENTS
    assert killed.step == unbroken.step
    assert killed.evaluation == unbroken.evaluation
    assert len(rows.rows) == len(expected.rows) == NUM_EVENTS
    assert rows.rows.tobytes() == expected.rows.tobytes()
    registry = ModelRegistry(home.models)
    for stage in ("ranking", "cascading", "retrieval"):
        published = registry.latest_loadable(stage, "default")
        assert published is not None
        other = ModelRegistry(unbroken_home.models).latest_loadable(stage, "default")
        assert other is not None
        for name, tensor in published.tensors.items():
            assert tensor.equal(other.tensors[name]), f"{stage}: {name}"


def test_a_later_run_continues_with_what_the_log_has_gained(
    ray_cluster: None, tmp_path: Path
) -> None:
    home = make_home(tmp_path)
    first, _ = train(home)
    more = WorldConfig(num_users=NUM_USERS, num_items=200, num_events=1_000, seed=1)
    write_world(home, more)
    second, rows = train(home)
    assert second.events_seen == first.events_seen + 1_000 == EventLog(home.log).num_events()
    assert second.versions == {"ranking": 2, "cascading": 2, "retrieval": 2}
    assert (rows.rows["written_step"] >= 0).all()


def test_an_empty_log_is_a_clear_error(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no events"):
        run_training(Home(tmp_path).create(), CONFIG)
