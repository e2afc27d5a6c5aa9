"""The ranking model: writes the memory and predicts every task (Section 2.1, Algorithm 1)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from marm.config import ModelConfig
from marm.error_memory import ErrorMemory
from marm.error_vectors import ErrorTable, error_tables, newest_rows, state_widths
from marm.heads import MixtureOfExpertsHeads
from marm.inputs import ModelInputs
from marm.items import ItemFeatures
from marm.matches import Match, match_embeddings
from marm.memory import UserRows
from marm.network import Embedded, Prediction, SequenceNetwork
from marm.sparse import SparseTable
from marm.stage_model import LearningRows
from marm.supervised import SupervisedModel


class RankerNet(nn.Module):
    """Dense half: multi-layer target attention, then multi-task heads on y_{L+1}."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sequence = SequenceNetwork(config)
        self.match = Match(self.sequence.output_dim, config.feature_dim)
        input_dim = self.sequence.output_dim + 5 * config.feature_dim
        self.heads = MixtureOfExpertsHeads(
            input_dim, len(config.tasks), config.num_experts, config.expert_dim
        )
        self.prior_scale = nn.Parameter(torch.ones(len(config.tasks)))
        self.errors = ErrorMemory(config, state_widths(config)) if config.keeps_errors else None

    def forward(
        self, embedded: Embedded, prior_BT: Tensor, block_memory_BLD: Tensor | None = None
    ) -> Prediction:
        """All tasks, and the rows y_1..y_L to save."""
        target = embedded.target_BF + embedded.context_BF
        known = self.sequence(target, embedded, block_memory_BLD)
        logits = self.predict(
            known.interest_BX, embedded.target_BF, embedded.user_BF, embedded.context_BF, prior_BT
        )
        if self.errors is None:
            nothing_B0T = logits[:, None][:, :0]
            return Prediction(logits, known.rows_BLD, known.auxiliary_BA, nothing_B0T)
        corrected_BET, rows = self.errors(logits, embedded.errors, known.history)
        rows_BLD = torch.cat([torch.stack(rows, dim=1), known.rows_BLD], dim=1)
        return Prediction(logits, rows_BLD, known.auxiliary_BA, corrected_BET)

    def predict(
        self,
        interest_BX: Tensor,
        target_BF: Tensor,
        user_BF: Tensor,
        context_BF: Tensor,
        prior_BT: Tensor,
    ) -> Tensor:
        """Logits ``[B, T]`` of what is known of each query."""
        matches = [self.match(interest_BX, target_BF), match_embeddings(user_BF, target_BF)]
        features = torch.cat([interest_BX, target_BF, user_BF, context_BF, *matches], dim=-1)
        logits: Tensor = self.heads(features) + self.prior_scale * prior_BT
        return logits


class Ranker(SupervisedModel):
    """Predicts ``config.tasks`` for (user, item) pairs; in training also yields rows to save."""

    def __init__(self, config: ModelConfig, table: SparseTable | None = None) -> None:
        super().__init__(config, config.tasks, RankerNet(config), table)
        self.error_tables = nn.ModuleList(error_tables(config))

    def embed(self, inputs: ModelInputs) -> Embedded:
        """See `StageModel.embed`."""
        return self._with_errors(super().embed(inputs))

    def look_up(self, inputs: ModelInputs) -> Embedded:
        """See `StageModel.look_up`."""
        return self._with_errors(super().look_up(inputs))

    def learning_rows(self, embedded: Embedded) -> list[LearningRows]:
        """See `StageModel.learning_rows`: the vectors that errors are told of."""
        found = zip(self._tables(), embedded.errors, strict=True)
        return [LearningRows(table, of.sparse) for table, of in found]

    def _with_errors(self, embedded: Embedded) -> Embedded:
        if not self.config.keeps_errors:
            return embedded
        newest = newest_rows(embedded.inputs)
        found = (
            table.look_up(embedded.inputs, newest, self._places, layer)
            for layer, table in enumerate(self._tables())
        )
        return replace(embedded, errors=tuple(found))

    def _places(self, addresses: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.table.stat_slots(torch.from_numpy(addresses)).numpy()

    def _tables(self) -> list[ErrorTable]:
        return [table for table in self.error_tables if isinstance(table, ErrorTable)]

    def score(
        self,
        rows: UserRows,
        user_id: int,
        candidates: ItemFeatures,
        now_ms: int,
        context_id: int = 0,
    ) -> NDArray[np.float32]:
        """Probabilities (seconds for watch time) of all tasks, ``[M, T]``; see `predict`."""
        return self.predict(rows, user_id, candidates, now_ms, context_id)
