"""A test-then-train pass that stops before every batch of a window, to ask the model of that moment
more than the loop asks it: what it would predict with another memory.

Shape legend: B events, L stored layers, D row width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.paper.datasets import Dataset
from benchmarks.paper.phases import PhaseClock, TimedLearner
from benchmarks.paper.trial import Cost, Pass, Predictions
from cache_actors.event_log.offsets import LogOffsets
from marm.events import EventBatch
from marm.inputs import ModelInputs
from marm.memory import Memory
from marm.ranker import Ranker
from train.collective import SingleWorker
from train.config import TrainConfig
from train.metrics import EvaluationWindow
from train.stream import Hooks, StreamTrainer


@dataclass(frozen=True)
class Piece:
    """The events of the next step, which nothing has learned yet."""

    events: EventBatch
    start: int  # place of the first one in the stream
    model: Ranker  # as it will predict them
    step: int  # that will learn them


Watch = Callable[[Piece], None]
"""What is done before a step. It must leave the model and the memory of the pass alone."""


@dataclass(frozen=True)
class Answer:
    """What a model says of some events, learning nothing."""

    score_B: NDArray[np.float32]  # of its first task
    rows_BLD: NDArray[np.float32]  # y_1..y_L (Eq. 7, 8)


class GrowingSource:
    """A source (`train.batcher.EventSource`) that has only the first events of a stream yet."""

    def __init__(self, events: EventBatch) -> None:
        self._events = events
        self._next = self.end = 0
        self.offsets = LogOffsets.start()  # such a stream is never resumed in the middle

    def next(self, max_events: int) -> EventBatch | None:
        """See `train.batcher.EventSource.next`."""
        if self._next >= self.end:
            return None
        begin, self._next = self._next, min(self._next + max_events, self.end)
        return self._events.take(slice(begin, self._next))


def run_watched(
    dataset: Dataset, config: TrainConfig, memory: Memory, since: int, watch: Watch
) -> Pass:
    """`benchmarks.paper.trial.run_pass`, with ``watch`` called before every step from the one on
    that learns the event at ``since``. The predictions of the pass are the same.

    The cost of the pass includes that of ``watch``.
    """
    source, clock = GrowingSource(dataset.events), PhaseClock()
    torch.set_num_threads(config.num_threads)
    nothing = EvaluationWindow(1, 0)
    trainer = StreamTrainer(config, memory, source, SingleWorker(), nothing)
    learner = TimedLearner(config.models[0], config, SingleWorker(), clock)
    trainer.learners = [learner]
    assert isinstance(learner.model, Ranker)
    cpu_began, began = time.process_time(), time.perf_counter()
    # Whole batches, so that the stream is cut as in a pass that does not stop.
    source.end = since // config.batch_size * config.batch_size
    trainer.run(Hooks.nothing())
    while source.end < len(dataset):
        start, source.end = source.end, min(source.end + config.batch_size, len(dataset))
        watch(
            Piece(dataset.events.take(slice(start, source.end)), start, learner.model, trainer.step)
        )
        trainer.run(Hooks.nothing())
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    score_N = np.concatenate([np.empty(0, np.float32), *learner.scores])
    return Pass(trainer, memory, score_N, Cost(len(dataset), seconds, cpu_s, clock.seconds()))


@torch.inference_mode()
def ask(model: Ranker, inputs: ModelInputs) -> Answer:
    """The forward pass of a training step on ``inputs``, without learning."""
    prior_BT = model.item_prior(model.item_slots(inputs))
    predicted = model.net(model.look_up(inputs), prior_BT)
    logits_BT, rows_BLD = predicted.best, predicted.rows_BLD
    return Answer(model.probabilities(logits_BT)[:, 0], rows_BLD.float().cpu().numpy())


class WatchedScores:
    """Scores that a watch collects under some names, event by event from the first piece on."""

    def __init__(self) -> None:
        self._start: int | None = None
        self._parts: dict[str, list[NDArray[np.float32]]] = {}

    def add(self, name: str, piece: Piece, score_B: NDArray[np.float32]) -> None:
        """The scores of a piece; pieces come in order."""
        self._start = piece.start if self._start is None else self._start
        self._parts.setdefault(name, []).append(score_B)

    def predictions(self, dataset: Dataset, window: str) -> dict[str, Predictions]:
        """Of a window that lies behind the start of the first piece, by name."""
        kept = np.flatnonzero(dataset.window(window))
        begin = 0 if self._start is None else self._start
        return {
            name: predictions_at(dataset, kept, np.concatenate(parts)[kept - begin])
            for name, parts in self._parts.items()
        }


def predictions_at(
    dataset: Dataset, kept: NDArray[np.int64], score: NDArray[np.float32]
) -> Predictions:
    """The predictions ``score`` of the events at ``kept``."""
    events = dataset.events
    return Predictions(events.user_id[kept], dataset.labels[kept], score, events.timestamp_ms[kept])


def first_of(dataset: Dataset, window: str) -> int:
    """Place of the first event of a window.

    Raises:
        ValueError: when it has none.
    """
    kept = np.flatnonzero(dataset.window(window))
    if not len(kept):
        raise ValueError(f"the {window} window of {dataset.name} has no labelled event")
    return int(kept[0])
