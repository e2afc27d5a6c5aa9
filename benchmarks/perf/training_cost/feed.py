"""How much of a training step the feed takes: log, memory fetch, building inputs, save.

A real log is streamed through a real pool of shards. The next batch is read, fetched and built in
another thread while one is learned, so what the feed takes is what the step waits for: all time in
which the training thread neither predicts nor learns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.paper.cost_streams import PausingSource, fill
from benchmarks.paper.datasets import Dataset
from benchmarks.paper.phases import PHASES, PhaseClock, TimedLearner, TimedMemory, TimedSource
from benchmarks.paper.plan import CommonSettings, parse_method
from benchmarks.perf.figures import Figure, Measured, at_most
from benchmarks.perf.timing import spread
from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.home import Home
from cache_actors.pool.client import MemoryClient
from cache_actors.pool.lifecycle import start_pool, stop_pool
from marm.events import EventBatch
from train.collective import SingleWorker
from train.config import TrainConfig
from train.metrics import EvaluationWindow
from train.stream import Hooks, StreamTrainer

_FEED_FRACTION = 0.30


@dataclass(frozen=True)
class FeedSettings:
    """One configuration whose feed is measured, over the end of a log."""

    key: str
    history_length: int = 50
    dim: int = 32
    depth: int = 2
    batch_size: int = 256
    num_shards: int = 1
    events_per_slice: int = 8_192
    slices: int = 5  # that count; one before them does not


DEFAULT_FEED = FeedSettings("feed_fraction")
LONG_FEED = FeedSettings("feed_fraction_long", 1_000, 64, 4, 64, events_per_slice=1_024, slices=3)


class StepClock(PhaseClock):
    """Time by the clock as well as CPU time."""

    def __init__(self) -> None:
        super().__init__()
        self.elapsed_s = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """See `PhaseClock.time`."""
        began = time.perf_counter()
        with super().time(phase):
            yield
        self.elapsed_s[phase] += time.perf_counter() - began


@dataclass(frozen=True)
class Slice:
    """What some events took, in seconds."""

    elapsed_s: float
    cpu_s: float  # of this process
    phase_elapsed_s: dict[str, float]
    phase_cpu_s: dict[str, float]

    @property
    def feed_fraction(self) -> float:
        """Share of the time in which nothing is predicted or learned."""
        model_s = self.phase_elapsed_s["predict"] + self.phase_elapsed_s["learn"]
        return 1 - model_s / self.elapsed_s

    @property
    def feed_cpu_fraction(self) -> float:
        """Share of this process's CPU time that is not spent on predicting and learning."""
        return 1 - (self.phase_cpu_s["predict"] + self.phase_cpu_s["learn"]) / self.cpu_s


def measure_feed(dataset: Dataset, settings: FeedSettings, home_path: Path) -> Measured:
    """The feed of one configuration; needs Ray.

    Raises:
        ValueError: when the log is too short.
    """
    num_timed = settings.events_per_slice * (settings.slices + 1)
    if num_timed > len(dataset):
        raise ValueError(
            f"{settings.key} trains on {num_timed:,} events, but {dataset.name} has "
            f"{len(dataset):,}; take a longer log"
        )
    start = len(dataset) - num_timed
    past, timed = (
        dataset.events.take(slice(begin, end)) for begin, end in ((0, start), (start, None))
    )
    common = CommonSettings(settings.history_length, settings.dim, batch_size=settings.batch_size)
    config = common.train_config(dataset, parse_method(f"marm_l{settings.depth}"), seed=0)
    home = Home(home_path).create()
    EventLog(home.log).append(timed)
    pool = start_pool(home, settings.num_shards, name=settings.key.replace("_", "-"))
    threads = torch.get_num_threads()
    torch.set_num_threads(config.num_threads)
    try:
        with MemoryClient(pool, config.namespace) as client:
            fill(client, newest_of_users(past, settings.history_length))
            slices = _train(config, client, EventLog(home.log), settings)
    finally:
        torch.set_num_threads(threads)
        stop_pool(pool)
    return _summary(settings, slices)


def _train(
    config: TrainConfig, client: MemoryClient, log: EventLog, settings: FeedSettings
) -> list[Slice]:
    clock = StepClock()
    source = PausingSource(TimedSource(log.reader(LogOffsets.start()), clock))
    trainer = StreamTrainer(
        config, TimedMemory(client, clock), source, SingleWorker(), EvaluationWindow(1, 0)
    )
    trainer.learners = [TimedLearner(config.models[0], config, SingleWorker(), clock)]
    slices = []
    for _ in range(settings.slices + 1):
        source.left = settings.events_per_slice
        before = Slice(0.0, 0.0, dict(clock.elapsed_s), clock.seconds())
        cpu_began, began = time.process_time(), time.perf_counter()
        trainer.run(Hooks.nothing())
        slices.append(
            Slice(
                time.perf_counter() - began,
                time.process_time() - cpu_began,
                _less(clock.elapsed_s, before.phase_elapsed_s),
                _less(clock.seconds(), before.phase_cpu_s),
            )
        )
    return slices[1:]


def _summary(settings: FeedSettings, slices: list[Slice]) -> Measured:
    def median(values: list[float]) -> float:
        return float(np.median(values))

    waits = [one.feed_fraction for one in slices]
    cpu = [one.feed_cpu_fraction for one in slices]
    shape = f"n={settings.history_length}, d={settings.dim}, L={settings.depth}"
    figures = (
        Figure(
            settings.key,
            f"share of the step that waits for log, fetch, inputs and save; {shape}",
            spread(median(waits), np.array(waits)),
            at_most(_FEED_FRACTION),
        ),
        Figure(
            f"{settings.key}_of_cpu",
            "share of the trainer's CPU time, whichever thread spends it",
            spread(median(cpu), np.array(cpu)),
        ),
    )
    scale = 1e6 / settings.events_per_slice
    medians = {
        f"{settings.key}_step_us_per_event": scale * median([one.elapsed_s for one in slices]),
        f"{settings.key}_cpu_us_per_event": scale * median([one.cpu_s for one in slices]),
    }
    for phase in PHASES:
        spent = [one.phase_cpu_s[phase] for one in slices]
        medians[f"{settings.key}_{phase}_cpu_us_per_event"] = scale * median(spent)
    rest = [one.cpu_s - sum(one.phase_cpu_s.values()) for one in slices]
    medians[f"{settings.key}_inputs_and_rest_cpu_us_per_event"] = scale * median(rest)
    return Measured(figures, medians)


def newest_of_users(events: EventBatch, n: int) -> EventBatch:
    """The newest ``n`` events of every user of events in time order."""
    order = np.argsort(events.user_id, kind="stable")
    users, counts = np.unique(events.user_id[order], return_counts=True)
    ends = np.repeat(np.cumsum(counts), counts)
    from_newest = ends - np.arange(len(order))
    return events.take(np.sort(order[from_newest <= n])) if len(users) else events


def longest_users(dataset: Dataset, num_events: int) -> Dataset:
    """Only the users with most events, as many as have ``num_events`` together: long histories."""
    users, counts = np.unique(dataset.events.user_id, return_counts=True)
    by_length = np.argsort(-counts, kind="stable")
    needed = int(np.searchsorted(np.cumsum(counts[by_length]), num_events)) + 1
    kept = np.isin(dataset.events.user_id, users[by_length[:needed]])
    return replace(
        dataset,
        events=dataset.events.take(kept),
        test=dataset.test[kept],
        tuning=dataset.tuning[kept],
    )


def _less(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {name: after[name] - before[name] for name in after}
