"""Products of embeddings, which the heads could form only by learning a multiplication."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EMBEDDING_GAIN = 8.0
"""Embeddings begin at a deviation of .05: without a gain their products would start at nothing."""


class Match(nn.Module):
    """How well two things agree, coordinate by coordinate: ``[B, F]``.

    Other methods' interests are of other widths, so an interest is first brought to that of
    embeddings, by its own coordinates at the start.
    """

    def __init__(self, interest_dim: int, feature_dim: int) -> None:
        super().__init__()
        self.interest = nn.Linear(interest_dim, feature_dim, bias=False)
        with torch.no_grad():
            self.interest.weight.copy_(torch.eye(feature_dim, interest_dim))

    def forward(self, interest_BX: Tensor, target_BF: Tensor) -> Tensor:
        """Products of the interests with the embeddings of their targets."""
        return match_embeddings(self.interest(interest_BX), target_BF)


def match_embeddings(left_BF: Tensor, right_BF: Tensor) -> Tensor:
    """Products of two embeddings, as large as other inputs of the heads; ``[B, F]``."""
    return left_BF * right_BF * EMBEDDING_GAIN
