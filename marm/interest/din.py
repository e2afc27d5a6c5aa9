"""DIN: Deep Interest Network, local activation without a softmax (Zhou et al., KDD 2018).

Shape legend: B queries, W columns of a window, H heads, F feature dim, A hidden width of the
activation unit, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from marm.config import ModelConfig
from marm.interest.interface import History, Interest, InterestOutput
from marm.interest.pooling import Readout, recency_of_heads, weighted_sums
from marm.interest.window import gather_window

ACTIVATION_WIDTH = 36
"""Hidden width of the activation unit in the paper."""


class Din(Interest):
    """Rows summed by weights s = MLP([k, q, k - q, k * q]), which need not add up to anything.

    Differences to the paper: rows and queries are normalised; there is one weight per head instead
    of one (with one head it is the paper's unit); the sum is divided by the root of the history
    length, a constant that keeps it of unit size and lets a longer history still weigh more; the
    activation is SiLU, which is the paper's Dice with alpha 0 and without statistics of the batch,
    on which no prediction may depend.

    Recency: under a softmax a learned bias is added to a logit, which multiplies the weight by its
    exponential. Here the weight of a row is multiplied by just that, ``s * exp(bias)``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        feature_dim = config.feature_dim
        self._dim, self._num_rows = config.attention_dim, config.history_length
        self.row_norm = nn.LayerNorm(feature_dim)
        self.query_norm = nn.LayerNorm(feature_dim)
        self.hidden = nn.Linear(4 * feature_dim, ACTIVATION_WIDTH)
        self.weight = nn.Linear(ACTIVATION_WIDTH, config.num_heads)
        self.recency = recency_of_heads(config)
        self.readout = Readout(feature_dim, config.num_heads * feature_dim, config.attention_dim)

    @property
    def output_dim(self) -> int:
        """See `Interest.output_dim`."""
        return self._dim

    def forward(self, query_BF: Tensor, history: History) -> InterestOutput:
        """See `Interest.forward`."""
        window = gather_window(history, self._num_rows, self.row_norm)
        hidden_BWA = self._hidden(self.query_norm(query_BF), window.keys)
        (bias_BHW,) = self.recency(window.distance, window.gap)
        weights_BHW = self.weight(nn.functional.silu(hidden_BWA)).transpose(1, 2) * bias_BHW.exp()
        weights_BHW = weights_BHW * window.visible.unsqueeze(1) * self._num_rows**-0.5
        pooled_BHF = weighted_sums(weights_BHW, window.keys)
        return InterestOutput(self.readout(query_BF, pooled_BHF.flatten(1)))

    def _hidden(self, q_BF: Tensor, keys: Tensor) -> Tensor:
        """``[B, W, A]``: the first layer on [k, q, k - q, k * q].

        That is linear in k once q is known: per query one matrix and one offset, so that nothing
        of the width of all four is laid out per row.
        """
        of_row, of_query, of_difference, of_product = self.hidden.weight.chunk(4, dim=1)
        matrix_BAF = of_row + of_difference + of_product * q_BF.unsqueeze(1)
        offset_BA = nn.functional.linear(q_BF, of_query - of_difference, self.hidden.bias)
        if len(keys) == 1:
            content = torch.matmul(keys[0], matrix_BAF.transpose(1, 2))
        else:
            content = torch.bmm(keys, matrix_BAF.transpose(1, 2))
        return content + offset_BA.unsqueeze(1)
