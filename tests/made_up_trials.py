"""A small made-up data set, configurations for it, and the plain test-then-train loop."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from sample_events import fetch_for, make_events, replaced

from benchmarks.paper.datasets import Dataset, last_part
from benchmarks.paper.plan import CommonSettings, parse_method
from benchmarks.paper.watched_pass import Piece
from cache_actors.store.row_formats import as_read
from marm.memory import InProcessMemory
from marm.sequence import raw_rows
from train.collective import SingleWorker
from train.config import TrainConfig
from train.learner import Learner


def make_dataset(num_events: int = 240, num_users: int = 6) -> Dataset:
    """Every label is observed."""
    events = make_events(num_events, num_users)
    labels = np.where(np.isnan(events.labels), 0, events.labels)
    return Dataset(
        "made-up",
        replaced(events, labels=labels.astype(np.float32)),
        **last_part(num_events, num_events),
        features=("item", "tag"),
        feedback_signals=("long_view",),
        recency=("distance",),
    )


def small_config(common: CommonSettings, name: str, dataset: Dataset, seed: int = 0) -> TrainConfig:
    """The configuration of a method, with a table of 512 rows."""
    config = common.train_config(dataset, parse_method(name), seed)
    return replace(config, models=(replace(config.models[0], num_slots=512),))


def nothing(piece: Piece) -> None:
    """A watch that asks nothing."""


def plain_loop(dataset: Dataset, config: TrainConfig) -> NDArray[np.float32]:
    """Scores of the one model of ``config``, which writes its own memory: predict, save, learn;
    nothing overlaps, nothing is clever."""
    learner = Learner(config.models[0], config, SingleWorker())
    memory = InProcessMemory(config.namespace)
    scores = []
    for start in range(0, len(dataset), config.batch_size):
        events = dataset.events.take(slice(start, start + config.batch_size))
        rows = fetch_for(events, memory, config.history_length)
        output = learner.predict(
            learner.model.inputs.for_training(events, rows), events.labels, None
        )
        scores.append(output.scores_BT[:, 0])
        new = raw_rows(events, config.namespace.row_dtype)
        assert output.rows_BLD.shape == new["memory"].shape
        new["memory"], new["written_step"] = output.rows_BLD.float().numpy(), 0
        memory.save(events.user_id, as_read(config.namespace, new))
        learner.learn(events.labels, learner.model.num_labels(events.labels))
    return np.concatenate(scores)
