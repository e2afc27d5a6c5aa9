"""What the models of all three stages have in common.

Shape legend: B queries, T tasks, L layers, D row width, F feature dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from marm.config import ModelConfig
from marm.events import TASKS, WATCH_TIME
from marm.inputs import InputBuilder, ModelInputs
from marm.item_stats import ItemStats
from marm.memory import UserRows
from marm.network import Embedded, SequenceNetwork, embed, look_up
from marm.search import RowSearch
from marm.sparse import SparseRows, SparseTable
from marm.tables import build_table

Net = Callable[..., "tuple[Tensor, ...]"]
"""The dense half of a model, or the same half wrapped for distributed training."""


@dataclass(frozen=True)
class StepOutput:
    """One training forward pass."""

    loss_sum: Tensor  # scalar, to be divided by what `StageModel.num_labels` counts
    scores_BT: NDArray[np.float32]  # predictions made before learning, one column per task
    rows_BLD: Tensor  # y_1..y_L (Eq. 7, 8), detached
    user_vectors_BKV: Tensor | None = None  # of retrieval, detached


@dataclass(frozen=True)
class LearningRows:
    """Rows of one table of errors. They learn from gradients summed, not averaged, over events."""

    table: SparseTable
    rows: SparseRows


class StageModel(nn.Module, ABC):
    """A sparse half (`table`), running item statistics (`stats`) and a dense half (`net`)."""

    def __init__(
        self,
        config: ModelConfig,
        tasks: tuple[str, ...],
        net: nn.Module,
        table: SparseTable | None = None,
    ) -> None:
        super().__init__()
        self.config, self.tasks, self.net = config, tasks, net
        self.table = build_table(config) if table is None else table
        self.table.initialise()
        self.stats = ItemStats(config.num_slots, len(tasks))
        self.inputs = InputBuilder(config, self.table)
        self._task_columns = [TASKS.index(task) for task in tasks]
        self._is_regression = np.array([task == WATCH_TIME for task in tasks])

    def embed(self, inputs: ModelInputs) -> Embedded:
        """Look up the table rows of ``inputs`` (Eq. 2)."""
        return embed(self.table, inputs)

    def look_up(self, inputs: ModelInputs) -> Embedded:
        """`embed` for inference: the same embeddings, nothing collects a gradient."""
        return look_up(self.table, inputs)

    def learning_rows(self, embedded: Embedded) -> list[LearningRows]:
        """Beside those of ``embedded.sparse`` in `table`: rows of other tables that learn from a
        batch, at a pace of their own."""
        return []

    def targets(self, labels_B: NDArray[np.float32]) -> Tensor:
        """Training targets ``[B, T]`` of `EventBatch.labels`: watch time as log1p of seconds."""
        selected = labels_B[:, self._task_columns]
        logged = np.log1p(np.maximum(selected, 0.0))
        return torch.from_numpy(np.where(self._is_regression, logged, selected)).to(
            self.table.weight.device
        )

    def item_prior(self, item_slots_B: Tensor) -> Tensor:
        """The wide input ``[B, T]``: logit of the smoothed item mean; the mean of a regression."""
        means = self.stats.means(item_slots_B)
        regression = torch.from_numpy(self._is_regression).to(means.device)
        return torch.where(regression, means, torch.logit(means.clamp(1e-4, 1 - 1e-4)))

    def item_slots(self, inputs: ModelInputs) -> Tensor:
        """Where the statistics of the targets' item ids are kept, ``[B]``."""
        return self.stat_slots(inputs.target_slots_BK)

    def stat_slots(self, item_slots_BK: NDArray[np.int64]) -> Tensor:
        """Where the statistics of items are kept, ``[B]``, given the addresses of their features,
        item ids first."""
        addresses = torch.from_numpy(item_slots_BK[:, 0].copy()).to(self.table.weight.device)
        return self.table.stat_slots(addresses)

    def probabilities(self, logits_BT: Tensor) -> NDArray[np.float32]:
        """Outputs as probabilities, or seconds for watch time."""
        regression = torch.from_numpy(self._is_regression).to(logits_BT.device)
        seconds = torch.expm1(logits_BT.clamp(0.0, 12.0))
        result = torch.where(regression, seconds, torch.sigmoid(logits_BT))
        return result.float().cpu().numpy()

    def supervised_loss(self, logits_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Summed loss over observed labels: BCE, squared error for watch time."""
        observed = ~targets_BT.isnan()
        target = torch.where(observed, targets_BT, torch.zeros_like(targets_BT))
        regression = torch.from_numpy(self._is_regression).to(logits_BT.device)
        loss = torch.where(
            regression,
            (logits_BT - target).square(),
            nn.functional.binary_cross_entropy_with_logits(
                logits_BT, target.clamp(0.0, 1.0), reduction="none"
            ),
        )
        return (loss * observed).sum()

    def num_labels(self, labels_B: NDArray[np.float32]) -> int:
        """Number of terms in the loss of a batch: observed labels of the tasks."""
        return int((~np.isnan(labels_B[:, self._task_columns])).sum())

    @property
    def trained_search(self) -> RowSearch:
        """The rows that it attends to in training, and in serving unless a plan says otherwise."""
        return self._sequence.search

    @property
    def _sequence(self) -> SequenceNetwork:
        sequence = self.net.sequence
        assert isinstance(sequence, SequenceNetwork)
        return sequence

    @abstractmethod
    def training_forward(
        self,
        net: Net,
        embedded: Embedded,
        labels_B: NDArray[np.float32],
        block_memory_BLD: Tensor | None = None,
    ) -> StepOutput:
        """Predict and compute the loss of a micro-batch; learns nothing yet.

        Args:
            net: ``self.net``, or its distributed wrapper.
            embedded: the embedded micro-batch.
            labels_B: `EventBatch.labels` of the batch.
            block_memory_BLD: vectors the ranking model computed for the batch's own events, for
                models that read its memory; None for the model that writes it.
        """


def check_single_user(rows: UserRows, user_id: int) -> None:
    """Raise ValueError unless ``rows`` holds exactly the run of ``user_id``."""
    if rows.user_ids.tolist() != [user_id]:
        raise ValueError(
            f"expected the rows of user {user_id} alone, got rows of {rows.user_ids.tolist()}; "
            "fetch one user per request"
        )
