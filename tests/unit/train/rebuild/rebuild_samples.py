"""Histories, frozen weights and what streaming with them writes, for the tests of rebuild."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sample_events import make_events, small_config

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from marm.events import EventBatch
from marm.memory import InProcessMemory, Namespace, UserRows
from marm.ranker import Ranker
from train.collective import SingleWorker
from train.config import TrainConfig
from train.metrics import EvaluationWindow
from train.rebuild.weights import RankingWeights
from train.stream import Hooks, StreamTrainer

STEP = 1_000
"""Of the frozen version: after every step that `streamed` takes."""

NOTHING_IS_LEARNED = 1e-30
"""A learning rate that changes no weight: what is far below its rounding is lost."""


def frozen_weights(seed: int = 0, **settings: Any) -> RankingWeights:
    """Random weights, published at `STEP` for the whole log."""
    config = small_config(**settings)
    torch.manual_seed(seed)
    model = Ranker(config)
    with torch.no_grad():
        for parameter in model.net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
        model.table.weight.mul_(10)
        # Item means that no stream moves: rows of errors hold predictions, which depend on them.
        model.stats.counts.fill_(1e15)
        model.stats.sums.copy_(model.stats.counts * torch.rand_like(model.stats.sums))
        model.stats.total_counts.fill_(1e15)
        model.stats.total_sums.fill_(4e14)
    whole_log = LogOffsets.at_segment(1 << 30)
    return RankingWeights("default", 1, STEP, config, model.state_dict(), whole_log)


class SmallPool(InProcessMemory):
    """The reference store with the selection of layers that a pool has."""

    def fetch(
        self,
        user_ids: NDArray[np.int64],
        n: int,
        before_ms: NDArray[np.int64] | None = None,
        *,
        layers: int | None = None,
    ) -> UserRows:
        found = super().fetch(user_ids, n, before_ms)
        rows = np.zeros(len(found.rows), self.namespace.layers_dtype(layers))
        for name in rows.dtype.names or ():
            column = found.rows[name]
            rows[name] = column[:, :layers] if name == "memory" else column
        return UserRows(found.user_ids, found.offsets, rows)


@dataclass(frozen=True)
class Streamed:
    """A log and the memory that training made of it."""

    log: EventLog
    memory: SmallPool


def streamed(
    path: Path, weights: RankingWeights, events: EventBatch, batch_size: int = 32
) -> Streamed:
    """Training itself, over ``events`` with ``weights`` that stay as they are."""
    log = EventLog(path)
    log.append(events)
    memory = SmallPool(weights.config.namespace)
    config = TrainConfig(
        models=(weights.config,),
        batch_size=batch_size,
        dense_learning_rate=NOTHING_IS_LEARNED,
        sparse_learning_rate=NOTHING_IS_LEARNED,
        error_learning_rate=NOTHING_IS_LEARNED,
    )
    trainer = StreamTrainer(
        config, memory, log.reader(LogOffsets.start()), SingleWorker(), EvaluationWindow(1, 0)
    )
    trainer.learners[0].model.load_state_dict(weights.tensors)
    trainer.run(Hooks(lambda: None, lambda: None, lambda: None))
    for name, tensor in weights.tensors.items():
        if name.startswith(("net.", "table.")):
            assert tensor.equal(trainer.learners[0].model.state_dict()[name]), name
    return Streamed(log, memory)


def sample_history(num_events: int = 400, num_users: int = 7, seed: int = 3) -> EventBatch:
    """Events of a few users with histories of very different lengths."""
    rng = np.random.default_rng(seed)
    events = make_events(num_events, num_users, seed)
    skewed = np.minimum(rng.geometric(0.4, num_events), num_users)
    events.user_id[:] = skewed
    return events


def namespace(**settings: Any) -> Namespace:
    """A small namespace."""
    return Namespace(**{"depth": 2, "dim": 8, "dtype": "float32", **settings})
