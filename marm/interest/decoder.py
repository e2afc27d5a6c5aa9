"""The full causal decoder of Fig. 2(b): what MARM's memory stands for, computed afresh.

Shape legend: R rows of all users, B queries, F feature dim, C width of an input, D width, U users,
H heads, E head width, K buckets of a bias table.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, cat

from marm.attention import MultiLayerTargetAttention, TargetAttention
from marm.config import InterestConfig, ModelConfig
from marm.interest.interface import History, Interest, InterestOutput
from marm.interest.pair_attention import softmax_attention
from marm.interest.pair_tiles import bias_table
from marm.interest.sequence_tokens import PlacedTokens, SequenceTokens


class Decoder(Interest):
    """MARM's upper bound: y_1..y_L of every row with the weights of the moment, at O(n^2).

    A row asks as MARM did when it was the target: its item (without its feedback) attends to the
    rows before it, layer by layer. Its key in layer l >= 1 is, as in MARM, the normalised y_l
    beside the normalised live embedding of its item and feedback; only, y_l is not a stored vector
    of older weights, and the gradient passes through it. A query attends to these keys in every
    layer. The rows' states are computed once per user and batch; rows see what the batch has of
    their past.

    ``layers`` is the L of MARM: rows pass L layers, queries L + 1. A row asks without the duration
    of its item, which rows do not have. Recency enters as in MARM.
    """

    def __init__(self, config: ModelConfig, interest: InterestConfig) -> None:
        super().__init__()
        dim = config.attention_dim
        self._dim = dim
        self.attention = MultiLayerTargetAttention(
            config.feature_dim,
            config.feature_dim,
            dim,
            dim,
            interest.layers,
            config.num_heads,
            config.recency,
        )

    @property
    def output_dim(self) -> int:
        """See `Interest.output_dim`."""
        return self._dim

    def forward(self, query_BF: Tensor, history: History) -> InterestOutput:
        """See `Interest.forward`.

        Raises:
            ValueError: when ``history`` has no sequence or no items.
        """
        if history.items is None:
            raise ValueError(
                "the decoder asks with the items of rows, got a history without; set History.items"
            )
        attention, tokens = self.attention, SequenceTokens(history, len(query_BF))
        block = None if history.block is None else history.block.features
        live_RF = tokens.rows_of(history.slab.features, block)
        row_y = tokens.rows_of(history.items.slab_UNF, history.items.block_PF)
        query_y, biases = query_BF, bias_table(attention.recency)
        layers = [attention.first, *attention.layers]
        for index, module in enumerate(layers):
            layer = cast(TargetAttention, module)
            keys = attention.feature_norms[index](live_RF)
            if index > 0:
                keys = cat([attention.memory_norms[index - 1](row_y), keys], dim=-1)
            k_RHE, v_RHE = layer.keys_values(keys)
            rows = _LayerRows(
                layer, tokens.rows.padded(k_RHE), tokens.rows.padded(v_RHE), biases[index]
            )
            query_y = rows.attended_by(query_y, tokens.queries)
            if index < len(layers) - 1:
                row_y = rows.attended_by(row_y, tokens.rows)
        return InterestOutput(query_y)


class _LayerRows:
    """Keys and values of all rows in one layer."""

    def __init__(
        self, layer: TargetAttention, k_URHE: Tensor, v_URHE: Tensor, bias_HK: Tensor
    ) -> None:
        self._layer, self._k, self._v, self._bias = layer, k_URHE, v_URHE, bias_HK

    def attended_by(self, x: Tensor, tokens: PlacedTokens) -> Tensor:
        """The layer's output ``[tokens, D]`` for inputs ``[tokens, C]``."""
        q = tokens.padded(self._layer.queries(x))
        null_logit = self._layer.null_logit
        context = softmax_attention(q, self._k, self._v, self._bias, null_logit, tokens.tiles)
        return self._layer.finish(x, tokens.packed(context))
