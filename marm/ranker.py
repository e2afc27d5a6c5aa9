"""The ranking model: writes the memory and predicts every task (Section 2.1, Algorithm 1)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from marm.config import ModelConfig
from marm.heads import MixtureOfExpertsHeads
from marm.items import ItemFeatures
from marm.memory import UserRows
from marm.network import Embedded, SequenceNetwork
from marm.stage_model import Net, StageModel, StepOutput


class RankerNet(nn.Module):
    """Dense half: multi-layer target attention, then multi-task heads on y_{L+1}."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sequence = SequenceNetwork(config)
        input_dim = config.attention_dim + 3 * config.feature_dim
        self.heads = MixtureOfExpertsHeads(
            input_dim, len(config.tasks), config.num_experts, config.expert_dim
        )
        self.prior_scale = nn.Parameter(torch.ones(len(config.tasks)))

    def forward(
        self, embedded: Embedded, prior_BT: Tensor, block_memory_BLD: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits ``[B, T]`` and the rows to save ``[B, L, D]``."""
        target = embedded.target_BF + embedded.context_BF
        outputs = self.sequence(target, embedded, block_memory_BLD)
        features = torch.cat(
            [outputs[-1], embedded.target_BF, embedded.user_BF, embedded.context_BF], dim=-1
        )
        logits = self.heads(features) + self.prior_scale * prior_BT
        return logits, stack_rows(outputs)


def stack_rows(outputs: list[Tensor]) -> Tensor:
    """y_1..y_L of ``[y_1, ..., y_{L+1}]`` as ``[B, L, D]``; L may be 0."""
    if len(outputs) == 1:
        return outputs[0].new_zeros((outputs[0].shape[0], 0, outputs[0].shape[1]))
    return torch.stack(outputs[:-1], dim=1)


class Ranker(StageModel):
    """Predicts ``config.tasks`` for (user, item) pairs; in training also yields rows to save."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, config.tasks, RankerNet(config))

    def training_forward(
        self,
        net: Net,
        embedded: Embedded,
        labels_B: NDArray[np.float32],
        block_memory_BLD: Tensor | None = None,
    ) -> StepOutput:
        """See `StageModel.training_forward`."""
        prior = self.item_prior(self.item_slots(embedded.inputs))
        logits, rows = net(embedded, prior, block_memory_BLD)
        loss = self.supervised_loss(logits, self.targets(labels_B))
        return StepOutput(loss, self.probabilities(logits.detach()), rows.detach())

    @torch.inference_mode()
    def score(
        self,
        rows: UserRows,
        user_id: int,
        candidates: ItemFeatures,
        now_ms: int,
        context_id: int = 0,
    ) -> NDArray[np.float32]:
        """Scores of all ``candidates`` in one pass over one copy of the user's rows, ``[M, T]``.

        Equal to scoring them one by one: candidates attend to the history, never to each other.

        Raises:
            ValueError: when ``rows`` is not of exactly this user.
        """
        check_single_user(rows, user_id)
        inputs = self.inputs.for_candidates(rows, candidates, now_ms, context_id)
        logits, _ = self.net(self.embed(inputs), self.item_prior(self.item_slots(inputs)))
        return self.probabilities(logits)


def check_single_user(rows: UserRows, user_id: int) -> None:
    """Raise ValueError unless ``rows`` holds exactly the run of ``user_id``."""
    if rows.user_ids.tolist() != [user_id]:
        raise ValueError(
            f"expected the rows of user {user_id} alone, got rows of {rows.user_ids.tolist()}; "
            "fetch one user per request"
        )
