"""Sum pooling, the Baseline of Table 1: the mean of the newest n rows, whatever the target is.

Shape legend: B queries, W columns of a window, H heads, F feature dim, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from marm.config import ModelConfig
from marm.interest.interface import History, Interest, InterestOutput
from marm.interest.pooling import MASKED, Readout, recency_of_heads, weighted_sums
from marm.interest.window import gather_window


class SumPooling(Interest):
    """Mean of the visible rows per head, weighted by recency only.

    A mean and not a sum, so that the length of a history does not set the size of its vector; no
    row is a vector of zeros. Recency: the weights are the softmax of the learned bias for distance
    and gap that attention methods add to their logits, here with no content beside it. One head of
    two starts as the plain mean, the other as one that decays with the distance.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._dim, self._num_rows = config.attention_dim, config.history_length
        self.row_norm = nn.LayerNorm(config.feature_dim)
        self.recency = recency_of_heads(config)
        self.readout = Readout(
            config.feature_dim, config.num_heads * config.feature_dim, config.attention_dim
        )

    @property
    def output_dim(self) -> int:
        """See `Interest.output_dim`."""
        return self._dim

    def forward(self, query_BF: Tensor, history: History) -> InterestOutput:
        """See `Interest.forward`; rows that queries share are pooled once."""
        window = gather_window(history, self._num_rows, self.row_norm)
        (bias_BHW,) = self.recency(window.distance, window.gap)
        visible_B1W = window.visible.unsqueeze(1)
        weights_BHW = torch.softmax(bias_BHW.masked_fill(~visible_B1W, MASKED), dim=-1)
        pooled = weighted_sums(weights_BHW * visible_B1W, window.keys)
        return InterestOutput(self.readout(query_BF, pooled.flatten(1).expand(len(query_BF), -1)))
