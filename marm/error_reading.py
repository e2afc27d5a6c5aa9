"""Accumulated prediction errors as cascading reads them: by a learned map.

Only the ranking model has the vectors that its errors are summed over (`marm.error_memory`), so for
cascading a state is a point in foreign coordinates. A linear map of it is added to its interest,
which its heads then bring together with targets as they do with the rest:

    interest' = interest + sum over layers of W_l state_l / deviation,    W_l = 0 at first.

At first a model is so exactly the one without these layers, and what they are worth is learned.

The state is that of the newest memorised row before the query, of the batch's own events where
there are some: all errors but the one of that row itself, as only ranking knows where it belongs.
Simultaneous rows have one state, and their mean is read. It is taken in the scale of the row, a sum
over the square root of its count, so that little evidence stays little; divided by the deviation
that ranking's vectors begin with, it is about as large as the interest. The rest of a stored vector
is left out: counts and logits are in scales of their own, and what is alike for all targets of a
user, such as his mean error, orders none of them.

Shape legend: B queries, U users, N slab length, J newest rows, P width of a state or of a block, D
row width, X width of the interest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marm.config import ModelConfig
from marm.error_vectors import INITIAL_DEVIATION, state_widths
from marm.interest.interface import History, WholePast


@dataclass(frozen=True)
class NewestStored:
    """The newest memorised rows before each query and what one layer holds in them."""

    num_queries: int
    query_J: Tensor  # int64
    user_J: Tensor  # int64, of the slab
    column_J: Tensor  # int64, of the slab
    share_J1: Tensor  # one over the rows that are newest together
    vectors_JD: Tensor

    @staticmethod
    def of(history: History, layer: int) -> NewestStored | None:
        """Those of ``history``; None where its rows do not have the layer."""
        slab, newest_BN = history.slab, whole_past(history).newest_BN
        if history.memory_UNLD.shape[2] <= layer or not newest_BN.shape[1]:
            return None
        query, column = torch.nonzero(newest_BN, as_tuple=True)
        user = query.new_zeros(len(query)) if slab.user_row is None else slab.user_row[query]
        vectors = history.memory_UNLD[user, column, layer]
        together_B1 = newest_BN.sum(dim=1, keepdim=True).to(vectors.dtype).clamp(min=1.0)
        return NewestStored(len(newest_BN), query, user, column, 1.0 / together_B1[query], vectors)

    def sum(self, values_JX: Tensor) -> Tensor:
        """Sums over the newest rows of each query, ``[B, X]``; 0 where it has none."""
        nothing = values_JX.new_zeros(self.num_queries, values_JX.shape[1])
        return nothing.index_add(0, self.query_J, values_JX)


class ErrorReading(nn.Module):
    """Brings the states of all layers of errors into the coordinates of an interest."""

    def __init__(self, config: ModelConfig, interest_dim: int) -> None:
        super().__init__()
        self._widths = state_widths(config)
        self.weight = nn.Parameter(torch.zeros(interest_dim, sum(self._widths)))

    def forward(self, history: History) -> Tensor:
        """What to add to the interest, ``[B, X]``; one line for all candidates of a request."""
        states = [self._state(history, *layer) for layer in enumerate(self._widths)]
        scaled = torch.cat(states, dim=1) / INITIAL_DEVIATION
        return nn.functional.linear(scaled, self.weight)

    def _state(self, history: History, layer: int, width: int) -> Tensor:
        """State ``[B, P]`` of the newest rows; 0 where there are none with this layer."""
        whole = whole_past(history)
        stored = NewestStored.of(history, layer)
        if stored is None:
            state_BP = history.memory_UNLD.new_zeros(len(whole.newest_BN), width)
        else:
            state_BP = stored.sum(stored.share_J1 * stored.vectors_JD[:, :width])
        if whole.newest_block_BP is None:
            return state_BP
        if history.block_memory_BLD is None:
            raise ValueError(
                "errors are read from ranking's rows of the batch, got none: pass "
                "block_memory_BLD, or set error_layers to 0"
            )
        newest_BP = whole.newest_block_BP.to(state_BP.dtype)
        together_B1 = newest_BP.sum(dim=1, keepdim=True)
        in_block_BP = newest_BP @ history.block_memory_BLD[:, layer, :width].to(state_BP.dtype)
        return torch.where(together_B1 > 0, in_block_BP / together_B1.clamp(min=1.0), state_BP)


def whole_past(history: History) -> WholePast:
    """All of the past of queries; `ModelConfig` sees to it that it is there.

    Raises:
        ValueError: when the history was built for a model without errors.
    """
    if history.whole is None:
        raise ValueError("errors need the whole past of a history")
    return history.whole
