"""One test-then-train pass of one configuration over a data set held in memory.

The loop is the real one, `train.stream.StreamTrainer`, in this process: no Ray, no pool of shards,
and a store that keeps the rows a query can see (`marm.memory_arrays.ArrayMemory`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.paper.datasets import TASK, Dataset
from benchmarks.paper.phases import PhaseClock, TimedMemory, TimedSource
from benchmarks.paper.trained_by import build_learner
from cache_actors.event_log.offsets import LogOffsets
from marm.events import EventBatch
from marm.memory import Memory
from marm.memory_arrays import ArrayMemory
from train.collective import SingleWorker
from train.config import TrainConfig
from train.metrics import EvaluationWindow
from train.stream import Hooks, StreamTrainer

WINDOWS = ("test", "tuning")
_NOTHING = EvaluationWindow(1, 0)


@dataclass(frozen=True)
class Cost:
    """What a pass took.

    ``phases_s`` are CPU seconds: ``read``, ``fetch`` and ``save`` feed the data; ``predict`` and
    ``learn`` are the model; the rest of ``cpu_s`` builds inputs and keeps metrics. Reading and
    fetching run beside the model, so that phases may add up to more than ``seconds``.
    """

    num_events: int
    seconds: float  # by the clock
    cpu_s: float  # of all threads
    phases_s: dict[str, float]

    @property
    def events_per_s(self) -> float:
        """Events per second by the clock."""
        return self.num_events / max(self.seconds, 1e-9)

    @property
    def events_per_cpu_s(self) -> float:
        """Events per CPU second: what to compare when other work shares the machine."""
        return self.num_events / max(self.cpu_s, 1e-9)


@dataclass(frozen=True)
class Predictions:
    """Predictions of one window, event by event, in the order of the stream."""

    user_id: NDArray[np.int64]
    label: NDArray[np.float32]  # of `TASK`, observed
    score: NDArray[np.float32]  # predicted before the label was learned
    timestamp_ms: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.user_id)


@dataclass(frozen=True)
class TrialResult:
    """What a trial found, with everything it was run with."""

    settings: dict[str, Any]  # `TrainConfig.to_dict` and the data set's name
    windows: dict[str, Predictions]  # by name: those of `WINDOWS`
    cost: Cost


@dataclass(frozen=True)
class Pass:
    """A finished pass whose model and memory can still be asked."""

    trainer: StreamTrainer
    memory: Memory
    score_N: NDArray[np.float32]  # of every event of the stream
    cost: Cost


def run_trial(dataset: Dataset, config: TrainConfig) -> TrialResult:
    """Stream ``dataset`` once through the ranking model of ``config``.

    Equal configurations give equal predictions.
    """
    done = run_pass(dataset, config)
    settings = {"dataset": dataset.name, "num_events": len(dataset), "train": config.to_dict()}
    windows = {name: _predictions(dataset, name, done.score_N) for name in WINDOWS}
    return TrialResult(settings, windows, done.cost)


def run_pass(dataset: Dataset, config: TrainConfig, memory: Memory | None = None) -> Pass:
    """`run_trial`, up to the trained model and its memory.

    Args:
        dataset: what to stream.
        config: one ranking model; it must learn `TASK` first.
        memory: where rows go; a fresh `ArrayMemory` by default.

    Raises:
        ValueError: when the configuration has other models, or another first task.
    """
    model = config.models[0]
    if len(config.models) != 1 or model.stage != "ranking" or model.tasks[0] != TASK:
        raise ValueError(
            f"a trial takes one ranking model that learns {TASK!r} first, got the stages "
            f"{[model.stage for model in config.models]} and the tasks {model.tasks}"
        )
    if memory is None:
        memory = ArrayMemory(config.namespace, config.history_length)
    clock = PhaseClock()
    source = EventsInMemory(dataset.events)
    torch.set_num_threads(config.num_threads)
    trainer = StreamTrainer(
        config,
        TimedMemory(memory, clock),
        TimedSource(source, clock),
        SingleWorker(),
        _NOTHING,
    )
    learner = build_learner(config, clock)
    trainer.learners = [learner]
    cost = _timed_run(trainer, clock, len(dataset))
    score_N = np.concatenate([np.empty(0, np.float32), *learner.scores])
    if len(score_N) != len(dataset):
        raise AssertionError(f"{len(dataset)} events gave {len(score_N)} predictions")
    return Pass(trainer, memory, score_N, cost)


class EventsInMemory:
    """Events as a source of the training loop (`train.batcher.EventSource`)."""

    def __init__(self, events: EventBatch) -> None:
        self._events = events
        self._next = 0
        self.offsets = LogOffsets.start()  # such a stream is never resumed in the middle

    def next(self, max_events: int) -> EventBatch | None:
        """See `train.batcher.EventSource.next`."""
        if self._next >= len(self._events):
            return None
        begin, self._next = self._next, self._next + max_events
        return self._events.take(slice(begin, self._next))


def _timed_run(trainer: StreamTrainer, clock: PhaseClock, num_events: int) -> Cost:
    cpu_began, began = time.process_time(), time.perf_counter()
    trainer.run(Hooks.nothing())
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    return Cost(num_events, seconds, cpu_s, clock.seconds())


def _predictions(dataset: Dataset, window: str, score_N: NDArray[np.float32]) -> Predictions:
    kept = dataset.window(window)
    events = dataset.events
    return Predictions(
        events.user_id[kept], dataset.labels[kept], score_N[kept], events.timestamp_ms[kept]
    )
