"""What the methods that see raw rows share: attention to a window, its recency, the readout.

They differ in which rows they pool and by which weights. How rows enter (normalised, as in layer 0
of MARM), how recency biases them and what follows on the pooled vector are the same for all, and
the same as in `marm.attention.TargetAttention`, so that only the method is compared.

Shape legend: B queries, W columns of a window, H heads, E head width, D = H*E, F feature dim, X
width of what was pooled. A leading dim of 1 instead of B means that all queries share it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from marm.attention import FIRST_LAYER_DECAY, RecencyBias, begin_as_similarity
from marm.config import ModelConfig
from marm.interest.window import Window

MASKED = -1e9


def recency_of_heads(config: ModelConfig, num_poolings: int = 1) -> RecencyBias:
    """A recency bias per pooling and head that starts as that of MARM's layer 0 does: every other
    head decays."""
    slopes = [FIRST_LAYER_DECAY if head % 2 == 0 else 0.0 for head in range(config.num_heads)]
    return RecencyBias([list(slopes) for _ in range(num_poolings)], config.recency)


def weighted_sums(weights_BHW: Tensor, keys: Tensor) -> Tensor:
    """``[B, H, F]``: per head the sum of the rows ``[B or 1, W, F]`` by its weights."""
    if len(keys) == 1:
        return torch.matmul(weights_BHW, keys[0])
    return torch.bmm(weights_BHW, keys)


class WindowAttention(nn.Module):
    """Multi-head attention of queries to the rows of a window, without residual or feed-forward.

    Keys and values are never laid out per row: a head's query is carried to the rows' space, and
    the mixed row to the head's (``(q K^T) x = q (K x)``), which costs less than projecting rows
    that every query has for itself. A null key takes the weight when nothing matches.
    """

    def __init__(self, query_dim: int, feature_dim: int, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.query = nn.Linear(query_dim, dim)
        self.key = nn.Linear(feature_dim, dim, bias=False)
        self.value = nn.Linear(feature_dim, dim, bias=False)
        begin_as_similarity(self.query.weight, self.key.weight, feature_dim)
        self.null_logit = nn.Parameter(torch.zeros(num_heads))

    def logits(self, query_BF: Tensor, window: Window, bias: Tensor) -> Tensor:
        """``[B, H, W]`` for normalised queries and a bias ``[B or 1, H, W]``; hidden rows have
        `MASKED`."""
        q_BHE = self.query(query_BF).view(len(query_BF), self.num_heads, self.head_dim)
        q_BHE = q_BHE * self.head_dim**-0.5
        q_BHF = torch.einsum("bhe,hef->bhf", q_BHE, self._per_head(self.key))
        if len(window.keys) == 1:
            content_BHW = torch.matmul(q_BHF, window.keys[0].T)
        else:
            content_BHW = torch.bmm(q_BHF, window.keys.transpose(1, 2))
        return (content_BHW + bias).masked_fill(~window.visible.unsqueeze(1), MASKED)

    def mix(self, logits_BHW: Tensor, window: Window) -> Tensor:
        """``[B, D]``: values of the rows by the softmax of ``logits_BHW`` and the null key."""
        null_BH1 = self.null_logit.expand(len(logits_BHW), -1).unsqueeze(-1)
        weights = torch.softmax(torch.cat([logits_BHW, null_BH1], dim=-1), dim=-1)[..., :-1]
        mixed_BHF = weighted_sums(weights, window.keys)
        return torch.einsum("bhf,hef->bhe", mixed_BHF, self._per_head(self.value)).flatten(1)

    def forward(self, query_BF: Tensor, window: Window, bias: Tensor) -> Tensor:
        """``[B, D]``: attention to all visible rows of the window."""
        return self.mix(self.logits(query_BF, window, bias), window)

    def _per_head(self, linear: nn.Linear) -> Tensor:
        return linear.weight.view(self.num_heads, self.head_dim, -1)


class Readout(nn.Module):
    """From a query and what was pooled for it to what the heads read, ``[B, D]``.

    Residual connection and feed-forward block as `marm.attention.TargetAttention` ends.
    """

    def __init__(self, query_dim: int, pooled_dim: int, dim: int) -> None:
        super().__init__()
        self.output = nn.Linear(pooled_dim, dim)
        self.residual = nn.Identity() if query_dim == dim else nn.Linear(query_dim, dim)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward(self, query_BF: Tensor, pooled_BX: Tensor) -> Tensor:
        """``[B, D]``."""
        y_BD: Tensor = self.residual(query_BF) + self.output(pooled_BX)
        return y_BD + self.feed_forward(y_BD)
