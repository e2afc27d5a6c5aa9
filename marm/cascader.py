"""The cascading (pre-ranking) model: the ranker's attention on a short sequence, read only.

Section 2.3: it reads the memory that ranking accumulated and never writes it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from marm.config import ModelConfig
from marm.items import ItemFeatures
from marm.matches import Match
from marm.memory import UserRows
from marm.network import Embedded, Prediction, SequenceNetwork
from marm.sparse import SparseTable
from marm.supervised import SupervisedModel


class CascaderNet(nn.Module):
    """Dense half: multi-layer target attention and one small tower."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sequence = SequenceNetwork(config)
        self.match = Match(self.sequence.output_dim, config.feature_dim)
        input_dim = self.sequence.output_dim + 3 * config.feature_dim
        self.tower = nn.Sequential(
            nn.Linear(input_dim, config.expert_dim),
            nn.GELU(),
            nn.Linear(config.expert_dim, 1),
        )
        self.prior_scale = nn.Parameter(torch.ones(1))

    def forward(
        self, embedded: Embedded, prior_B1: Tensor, block_memory_BLD: Tensor | None = None
    ) -> Prediction:
        """One task; its layer outputs are not saved, and nothing corrects it."""
        target = embedded.target_BF + embedded.context_BF
        known = self.sequence(target, embedded, block_memory_BLD)
        match = self.match(known.interest_BX, embedded.target_BF)
        features = torch.cat(
            [known.interest_BX, embedded.target_BF, embedded.context_BF, match], dim=-1
        )
        logits = self.tower(features) + self.prior_scale * prior_B1
        return Prediction(logits, known.rows_BLD, known.auxiliary_BA, logits[:, None][:, :0])


class Cascader(SupervisedModel):
    """Predicts ``config.positive_task`` for (user, item) pairs, cheaply."""

    def __init__(self, config: ModelConfig, table: SparseTable | None = None) -> None:
        super().__init__(config, (config.positive_task,), CascaderNet(config), table)

    def score(
        self,
        rows: UserRows,
        user_id: int,
        candidates: ItemFeatures,
        now_ms: int,
        context_id: int = 0,
    ) -> NDArray[np.float32]:
        """Probability of the positive task, ``[M]``; see `predict`."""
        return self.predict(rows, user_id, candidates, now_ms, context_id)[:, 0]
