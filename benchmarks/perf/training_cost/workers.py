"""Two Ray Train workers against one, on the same events."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.perf.figures import Figure, Measured, at_least
from benchmarks.perf.timing import ratio_of_medians
from cache_actors.home import Home
from cache_actors.pool.lifecycle import start_pool, stop_pool
from marm.config import ModelConfig
from marm.memory import Namespace
from train.config import TrainConfig
from train.data.world import write_world
from train.data.world_config import WorldConfig
from train.run import run_training

_TWO_OVER_ONE = 1.5


@dataclass(frozen=True)
class WorkerSettings:
    """Sizes of the measurement. Every worker takes a batch of ``batch_size`` in each step."""

    num_users: int = 2_000
    num_items: int = 4_000
    num_events: int = 40_000
    history_length: int = 50
    dim: int = 32
    depth: int = 2
    batch_size: int = 256
    num_shards: int = 1
    rounds: int = 2
    seed: int = 0

    @staticmethod
    def quick() -> WorkerSettings:
        """Sizes that show that everything runs; their figures mean nothing."""
        return WorkerSettings(num_users=50, num_items=200, num_events=2_000, rounds=1)


def measure_workers(settings: WorkerSettings, home_path: Path) -> Measured:
    """Events per second of one worker and of two, in turn; needs Ray.

    The target holds where two cores are free for two workers besides what Ray, the shards and the
    workers' own feeds take; elsewhere the figure says what limits it.
    """
    home = Home(home_path).create()
    world = WorldConfig(
        num_users=settings.num_users,
        num_items=settings.num_items,
        num_events=settings.num_events,
        seed=settings.seed,
    )
    write_world(home, world)
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    pool = start_pool(home, settings.num_shards, name="workers")
    events_per_s: dict[int, list[float]] = {1: [], 2: []}
    try:
        for turn in range(settings.rounds):
            for num_workers, rates in events_per_s.items():
                # An epoch of its own, so that every run starts with an empty memory.
                epoch = 2 * turn + num_workers
                config = _config(settings, num_workers, epoch)
                result = run_training(home, config, f"run-{epoch}", pool="workers")
                rates.append(result.events_per_s)
    finally:
        stop_pool(pool)
    seconds = {
        num_workers: settings.num_events / np.array(rates)[:, None]
        for num_workers, rates in events_per_s.items()
    }
    reason = limiting_reason(cpus, load, settings.num_shards)
    figure = Figure(
        "workers_2_over_1",
        "events/s of two workers over one" + ("" if reason is None else f"; {reason}"),
        ratio_of_medians(seconds[1], seconds[2]),
        at_least(_TWO_OVER_ONE) if reason is None else None,
    )
    medians = {
        f"workers_{num_workers}_events_per_s": float(np.median(rates))
        for num_workers, rates in events_per_s.items()
    }
    return Measured((figure,), {**medians, "workers_load_before": load})


def limiting_reason(cpus: int, load: float, num_shards: int) -> str | None:
    """Why two workers can't be expected to be 1.5 times one here; None where they can.

    Two workers have two learning and two feeding threads, beside the shards.
    """
    wanted = 4 + num_shards
    free = cpus - load
    if free >= wanted:
        return None
    return (
        f"no target here: two workers keep {wanted} threads busy (2 learn, 2 feed, {num_shards} "
        f"of shards), and this machine has {cpus} CPUs with a load of {load:.1f} before the run; "
        "one worker and its feed leave little free, and where other work runs two workers also get "
        "twice the share of one"
    )


def _config(settings: WorkerSettings, num_workers: int, epoch: int) -> TrainConfig:
    namespace = Namespace(depth=settings.depth, dim=settings.dim)
    model = ModelConfig(
        namespace=replace(namespace, epoch=epoch),
        depth=settings.depth,
        history_length=settings.history_length,
        attention_dim=settings.dim,
        feature_dim=settings.dim,
    )
    return TrainConfig(
        models=(model,),
        batch_size=settings.batch_size,
        num_workers=num_workers,
        seed=settings.seed,
        evaluation_fraction=0.0,
    )
