"""HSTU*: full masked attention over the history, O(n^2) (Zhai et al., ICML 2024; Tables 1 and 2).

Shape legend: T tokens (rows or queries), B queries, F feature dim, H heads, E head width, D = H*E,
U users, R rows of the user who has most, K buckets of a bias table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from marm.attention import RecencyBias
from marm.config import InterestConfig, ModelConfig
from marm.interest.interface import History, Interest, InterestOutput
from marm.interest.pair_attention import silu_attention
from marm.interest.pair_tiles import bias_table
from marm.interest.sequence_tokens import PlacedTokens, SequenceTokens

NORM_EPSILON = 1e-6
"""Of the authors' code. Sums over few of n rows are small, and a larger one would hide them."""


class Hstu(Interest):
    """``layers`` HSTU blocks over a user's rows; the target is the last token (M-FALCON).

    ``U, V, Q, K = split(SiLU(W1 norm(x)))``, ``A = SiLU(Q K^T / sqrt(E) + bias) / n`` over the past
    of a token and itself, ``y = W2(norm(A V) * U) + x``; no softmax and no feed-forward. n is the
    history length. A row's token is its live embedding (item and feedback added up), that of a
    target its item and context. Rows see earlier rows and themselves; targets see the rows before
    them and themselves, no other target, so all targets of a batch or request share the states of
    the rows.

    The normalisation of x and the scale of the logits are those of the authors' code; the paper's
    equations leave them out. Recency: the relative bias is the learned one per head for distance
    and gap that all attention methods here have, with one of its own for the token itself.
    """

    def __init__(self, config: ModelConfig, interest: InterestConfig) -> None:
        super().__init__()
        if interest.layers < 1:
            raise ValueError(
                f"hstu needs at least one block, got layers={interest.layers}; raise it"
            )
        dim, heads = config.attention_dim, config.num_heads
        self._dim = dim
        self.recency = RecencyBias.of_layers(interest.layers - 1, heads, config.recency)
        self.token = nn.Linear(config.feature_dim, dim)
        self.blocks = nn.ModuleList(
            HstuBlock(dim, heads, config.history_length) for _ in range(interest.layers)
        )

    @property
    def output_dim(self) -> int:
        """See `Interest.output_dim`."""
        return self._dim

    def forward(self, query_BF: Tensor, history: History) -> InterestOutput:
        """See `Interest.forward`.

        Raises:
            ValueError: when ``history`` has no sequence.
        """
        tokens = SequenceTokens(history, len(query_BF))
        block_rows = None if history.block is None else history.block.features
        row_x = self.token(tokens.rows_of(history.slab.features, block_rows))
        query_x, biases = self.token(query_BF), bias_table(self.recency)
        for index, module in enumerate(self.blocks):
            block = cast(HstuBlock, module)
            row, query = block.norm(row_x), block.norm(query_x)
            own_of_row = block.keys_values(row)
            k, v = (tokens.rows.padded(own) for own in own_of_row)
            past = _Past(k, v, biases[index], tokens.queries)
            query_x = block(query_x, query, block.keys_values(query), past)
            if index < len(self.blocks) - 1:  # nobody reads what the last block makes of rows
                past = _Past(k, v, biases[index], tokens.rows)
                row_x = block(row_x, row, own_of_row, past)
        return InterestOutput(query_x)


@dataclass(frozen=True)
class _Past:
    """Keys and values of all rows in one block, and the tokens that read them."""

    k_URHE: Tensor
    v_URHE: Tensor
    bias_HK: Tensor
    tokens: PlacedTokens


class HstuBlock(nn.Module):
    """One block; W1 is two maps, as tokens that only serve as rows need no U and Q."""

    def __init__(self, dim: int, num_heads: int, history_length: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.history_length = history_length
        self.norm = nn.LayerNorm(dim, eps=NORM_EPSILON)
        self.gate_query = nn.Linear(dim, 2 * dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.self_bias = nn.Parameter(torch.zeros(num_heads))
        self.mixed_norm = nn.LayerNorm(dim, eps=NORM_EPSILON)
        self.output = nn.Linear(dim, dim)

    def keys_values(self, normal_TD: Tensor) -> tuple[Tensor, Tensor]:
        """K and V ``[T, H, E]`` of normalised tokens ``[T, D]``."""
        k_TD, v_TD = nn.functional.silu(self.key_value(normal_TD)).chunk(2, dim=-1)
        return self._heads(k_TD), self._heads(v_TD)

    def forward(
        self,
        x_TD: Tensor,
        normal_TD: Tensor,
        own: tuple[Tensor, Tensor],
        past: _Past,
    ) -> Tensor:
        """``[T, D]`` for tokens ``[T, D]``, given their own K and V and those of all rows."""
        tokens = past.tokens
        u_TD, q_TD = nn.functional.silu(self.gate_query(normal_TD)).chunk(2, dim=-1)
        q_THE = self._heads(q_TD) * self.head_dim**-0.5
        of_past = silu_attention(
            tokens.padded(q_THE), past.k_URHE, past.v_URHE, past.bias_HK, tokens.tiles
        )
        k_THE, v_THE = own
        own_logit_TH = (q_THE * k_THE).sum(dim=-1) + self.self_bias
        own_TD = (nn.functional.silu(own_logit_TH).unsqueeze(-1) * v_THE).flatten(1)
        mixed_TD = (tokens.packed(of_past) + own_TD) / self.history_length
        return x_TD + self.output(self.mixed_norm(mixed_TD) * u_TD)

    def _heads(self, x_TD: Tensor) -> Tensor:
        return x_TD.view(len(x_TD), self.num_heads, self.head_dim)
