"""Users whose histories are full, and one micro-batch of their next events, to train on again and
again: what rows say does not change what they cost."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from marm.config import InterestConfig, ModelConfig
from marm.events import TASKS, EventBatch
from marm.inputs import ModelInputs
from marm.memory import Namespace, UserRows
from marm.sequence import raw_rows
from train.collective import SingleWorker
from train.config import TrainConfig
from train.learner import Learner

TASK = "long_view"
_SECOND_MS = 1_000


@dataclass(frozen=True)
class BatchShape:
    """A micro-batch and the model that learns it. Items are drawn with probability ~ 1 / rank."""

    num_users: int = 32
    events_per_user: int = 1
    dim: int = 64
    num_heads: int = 2
    num_items: int = 20_000
    num_tags: int = 30

    @property
    def num_events(self) -> int:
        """Events of the batch."""
        return self.num_users * self.events_per_user


@dataclass(frozen=True)
class MethodCase:
    """One method at one history length."""

    history_length: int
    depth: int = 0
    interest: InterestConfig = field(default_factory=InterestConfig)

    def config(self, shape: BatchShape, seed: int) -> TrainConfig:
        """The training run it stands for; one thread, as runs have by default."""
        model = ModelConfig(
            namespace=Namespace(depth=self.depth, dim=shape.dim),
            depth=self.depth,
            history_length=self.history_length,
            attention_dim=shape.dim,
            feature_dim=shape.dim,
            num_heads=shape.num_heads,
            tasks=(TASK,),
            feedback_signals=(TASK,),
            features=("item", "tag"),
            recency=("distance",),
            interests=(self.interest,),
        )
        return TrainConfig(models=(model,), batch_size=shape.num_events, seed=seed)


class RepeatedStep:
    """The step of a `StreamTrainer` on one batch whose rows were fetched."""

    def __init__(self, shape: BatchShape, case: MethodCase, seed: int) -> None:
        rng = np.random.default_rng(seed)
        config = case.config(shape, seed)
        self.learner = Learner(config.models[0], config, SingleWorker())
        users = np.arange(1, shape.num_users + 1)
        past = _events(rng, shape, np.repeat(users, case.history_length), first_s=1)
        rows = raw_rows(past, config.namespace.row_dtype)
        rows["memory"] = rng.standard_normal(rows["memory"].shape, np.float32)
        rows["written_step"] = 0
        offsets = np.arange(len(users) + 1) * case.history_length
        self._rows = UserRows(users, offsets, rows)
        # Events of a user are apart, as in a stream.
        self.events = _events(
            rng,
            shape,
            np.tile(rng.permutation(users), shape.events_per_user),
            first_s=len(past) + 1,
        )

    def build(self) -> ModelInputs:
        """The inputs of the batch."""
        return self.learner.model.inputs.for_training(self.events, self._rows)

    def learn(self, inputs: ModelInputs) -> None:
        """Predict, then learn."""
        labels = self.events.labels
        self.learner.predict(inputs, labels, None)
        self.learner.learn(labels, self.learner.model.num_labels(labels))

    def run(self) -> None:
        """The whole step."""
        self.learn(self.build())


def _events(
    rng: np.random.Generator, shape: BatchShape, users: NDArray[np.int64], first_s: int
) -> EventBatch:
    """One event a second, in the order of ``users``."""
    count = len(users)
    ranks = np.arange(1, shape.num_items + 1)
    weights = 1 / ranks
    labels = np.full((count, len(TASKS)), np.nan, np.float32)
    labels[:, TASKS.index(TASK)] = rng.integers(0, 2, count)
    place = first_s + np.arange(count)
    nothing = np.zeros(count, np.int64)
    return EventBatch(
        user_id=users,
        item_id=rng.choice(ranks, count, p=weights / weights.sum()),
        timestamp_ms=place * _SECOND_MS,
        event_key=place.astype(np.uint64),
        author_id=nothing,
        tag_id=rng.integers(1, shape.num_tags + 1, count),
        duration_ms=nothing,
        context_id=nothing.astype(np.int32),
        labels=labels,
    )
