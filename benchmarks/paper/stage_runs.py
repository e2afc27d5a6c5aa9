"""One test-then-train pass of models of several stages over one memory, and what each predicted.

Shape legend: E sampled events, N events of the stream.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from app.ab_report.lift import UserSums
from benchmarks.paper.datasets import TASK, Dataset
from benchmarks.paper.phases import PhaseClock, TimedLearner
from benchmarks.paper.statistics import PairedDifference, paired_estimate
from benchmarks.paper.trial import Cost, EventsInMemory, Predictions
from benchmarks.paper.watched_pass import predictions_at
from marm.memory_arrays import ArrayMemory
from marm.retriever import Retriever
from train.collective import SingleWorker
from train.config import TrainConfig
from train.metrics import EvaluationWindow
from train.predictions import Predictions as StagePredictions
from train.retrieval_metrics import METHODS, RetrievalMetrics, sample_hashes
from train.stream import Hooks, StreamTrainer


@dataclass(frozen=True)
class Ranks:
    """Ranks of the true items of the sampled events (`train.retrieval_metrics`)."""

    user_id: NDArray[np.int64]  # [E]
    by_method: dict[str, NDArray[np.float64]]  # [E] each: retrieval and its baselines
    candidates: float  # items ranked, on average


@dataclass(frozen=True)
class StageRun:
    """What a pass found."""

    predictions: dict[str, Predictions]  # of the window, by stage
    ranks: Ranks | None  # None without retrieval, and where nothing was sampled
    cost: Cost


def run_stages(dataset: Dataset, config: TrainConfig, window: str) -> StageRun:
    """Stream ``dataset`` once through all models of ``config``.

    Equal configurations give equal results.
    """
    clock, kept = PhaseClock(), np.flatnonzero(dataset.window(window))
    torch.set_num_threads(config.num_threads)
    stamps = dataset.events.timestamp_ms[kept]
    evaluated = EvaluationWindow(int(stamps[0]), int(stamps[-1]))
    trainer = StreamTrainer(
        config,
        ArrayMemory(config.namespace, config.history_length),
        EventsInMemory(dataset.events),
        SingleWorker(),
        EvaluationWindow(1, 0),
    )
    learners = [TimedLearner(model, config, SingleWorker(), clock) for model in config.models]
    trainer.learners = list(learners)
    for learner in learners:
        if isinstance(learner.model, Retriever):
            trainer.retrieval_metrics = RetrievalMetrics(learner.model, evaluated, SingleWorker())
    cpu_began, began = time.process_time(), time.perf_counter()
    trainer.run(Hooks.nothing())
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    cost = Cost(len(dataset), seconds, cpu_s, clock.seconds())
    predictions = {
        learner.stage: predictions_at(dataset, kept, np.concatenate(learner.scores)[kept])
        for learner in learners
    }
    return StageRun(predictions, _ranks(dataset, trainer.retrieval_metrics), cost)


def stage_predictions(found: Predictions) -> StagePredictions:
    """The same as `train.agreement` takes it, for `TASK` alone."""
    days = np.zeros(len(found), np.int32)
    columns = ([found.label[:, None]], [found.score[:, None]])
    return StagePredictions((TASK,), [found.user_id], [days], *columns)


def paired_means(
    user_id: NDArray[np.int64],
    first: Sequence[NDArray[np.float64]],
    second: Sequence[NDArray[np.float64]],
) -> PairedDifference:
    """Mean of ``first`` less that of ``second``, of the same events seed by seed, with an interval
    over users and seeds.

    Raises:
        ValueError: when there are fewer than two users.
    """
    gap_SE = np.stack([a - b for a, b in zip(first, second, strict=True)])
    users, owner = np.unique(user_id, return_inverse=True)
    if len(users) < 2:
        raise ValueError(
            f"a paired test needs at least 2 users, got {len(users)}; evaluate more events"
        )
    sums, counts = np.zeros(len(users)), np.zeros(len(users))
    np.add.at(sums, owner, gap_SE.mean(axis=0))
    np.add.at(counts, owner, 1.0)
    return paired_estimate(UserSums(sums, counts), gap_SE.mean(axis=1).tolist())


def _ranks(dataset: Dataset, metrics: RetrievalMetrics | None) -> Ranks | None:
    if metrics is None or not len(metrics.sample):
        return None
    hashes = sample_hashes(dataset.events)
    order = np.argsort(hashes, kind="stable")
    place = order[np.searchsorted(hashes[order], metrics.sample.hashes)]
    by_method = dict(zip(METHODS, metrics.sample.ranks_BS.T, strict=True))
    candidates = float(metrics.sample.candidates.mean())
    return Ranks(dataset.events.user_id[place], by_method, candidates)
