"""The ranking model: writes the memory and predicts every task (Section 2.1, Algorithm 1)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from marm.config import ModelConfig
from marm.error_memory import UNCORRECTED_LOSS_WEIGHT, ErrorMemory
from marm.heads import MixtureOfExpertsHeads
from marm.items import ItemFeatures
from marm.matches import Match, match_embeddings
from marm.memory import UserRows
from marm.network import Embedded, SequenceNetwork
from marm.sparse import SparseTable
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
        self.errors = ErrorMemory(config) if config.keeps_errors else None

    def forward(
        self, embedded: Embedded, prior_BT: Tensor, block_memory_BLD: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``[B, T]``, the rows to save ``[B, L, D]`` and auxiliary logits ``[B, A]``."""
        target = embedded.target_BF + embedded.context_BF
        known = self.sequence(target, embedded, block_memory_BLD)
        logits = self.predict(
            known.interest_BX, embedded.target_BF, embedded.user_BF, embedded.context_BF, prior_BT
        )
        if self.errors is None:
            return logits, known.rows_BLD, known.auxiliary_BA
        corrected, row_BD = self.errors(logits, embedded.target_BF, known.history)
        rows_BLD = torch.cat([row_BD[:, None], known.rows_BLD], dim=1)
        # What the errors are measured from has to be a prediction of its own.
        first = self.errors.task
        auxiliary = torch.cat([known.auxiliary_BA, logits[:, first : first + 1]], dim=1)
        return corrected, rows_BLD, auxiliary

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

    def auxiliary_weights(self, auxiliary_BA: Tensor) -> Tensor:
        """See `SupervisedModel.auxiliary_weights`; the prediction before errors comes last."""
        weights = super().auxiliary_weights(auxiliary_BA)
        if self.config.keeps_errors:
            weights[-1] = UNCORRECTED_LOSS_WEIGHT
        return weights

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
