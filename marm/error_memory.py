"""Accumulated prediction errors: what a user's whole past says of a target beyond the model.

An event leaves behind how wrong the model was about it: e = label - prediction, a number that only
a memory can know later. Errors on items that resemble a target correct the target's own prediction.
With the inner product of item embeddings as resemblance, all of a user's past is one vector,

    S_t = sum over events i before t of e_i x_i,    state_t = S_t / sqrt(c_t + prior),

a linear attention whose output at every event is cached as MARM caches the outputs of its layers
(Eq. 7, 8): in the first stored layer. A query reads the newest cached row, adds that row's own
error, known only now, and so sees all of life at a cost that does not depend on its length.

A stored vector of width D holds the state (D - 3 numbers at most), the logit predicted for the
event, and the count c in two parts, each exact in half precision. The state is stored rather than
the sum, as it stays small. An event of which nothing was observed yet adds nothing; with other
feedback known, an unobserved label counts as negative, because a row says no more.

Shape legend: B queries, U users, N slab length, P width of the state, D row width, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marm.config import ModelConfig
from marm.interest.interface import History, ItemEmbeddings, RowLabels, WholePast

RESERVED = 3
"""Numbers of a stored vector that are not the state: logit, and two of the count."""

ITEM_GAIN = 4.0
"""Embeddings begin at a deviation of .05; sums of them begin near the size of other inputs."""

COUNT_PRIOR = 10.0
"""Events that the normalisation adds to the count: a single error is weak evidence."""

INITIAL_WEIGHT = 0.25

UNCORRECTED_LOSS_WEIGHT = 0.3
"""Of the prediction that errors are measured from, beside the corrected one."""

_COUNT_PART = 1024.0
_COUNT_SCALE = 256.0


@dataclass(frozen=True)
class ErrorState:
    """What the errors before each query add up to."""

    state_BP: Tensor  # one line for all candidates of a request
    count_B1: Tensor  # events behind it


class ErrorMemory(nn.Module):
    """Corrects logits by the state, and computes the rows that carry it on."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._row_dim = config.attention_dim
        self.width = state_width(config)
        self.weight = nn.Parameter(torch.full((len(config.tasks), self.width), INITIAL_WEIGHT))
        self.task = config.tasks.index(config.positive_task)

    def forward(
        self, logits_BT: Tensor, target_BF: Tensor, history: History
    ) -> tuple[Tensor, Tensor]:
        """Corrected logits ``[B, T]`` and the vectors to save ``[B, D]``.

        The errors are those of the logits given: a correction is none of its own past.
        """
        own_B1 = logits_BT[:, self.task : self.task + 1].detach()
        before = self.before(history, own_B1)
        x_BP = target_BF[:, : self.width] * ITEM_GAIN
        corrected = logits_BT + (x_BP * before.state_BP) @ self.weight.T
        return corrected, self._rows(before, own_B1)

    def before(self, history: History, logit_B1: Tensor) -> ErrorState:
        """The state before each query; ``logit_B1`` are the logits of the block's events."""
        items, labels, whole = _parts(history)
        sums, count = self._stored(history)
        if items.block_PF is not None and labels.block_P is not None and whole.block_BP is not None:
            x_BP = items.block_PF[:, : self.width] * ITEM_GAIN
            error_B1 = _error(labels.block_P[:, None], logit_B1)
            past_BB = whole.block_BP.to(x_BP.dtype)
            sums = sums + past_BB @ (error_B1 * x_BP)
            count = count + past_BB.sum(dim=1, keepdim=True)
        return ErrorState(sums / torch.sqrt(count + COUNT_PRIOR), count)

    def _stored(self, history: History) -> tuple[Tensor, Tensor]:
        """Sum ``[B, P]`` and count ``[B, 1]`` after the newest memorised rows of each query.

        Simultaneous rows have the same state and did not see each other: each adds its own error.
        """
        slab, (items, labels, whole) = history.slab, _parts(history)
        newest = whole.newest_BN
        if not history.memory_UNLD.shape[2] or not newest.shape[1]:
            empty = items.slab_UNF.new_zeros(len(newest), self.width)
            return empty, empty[:, :1]
        query, column = torch.nonzero(newest, as_tuple=True)
        user = query.new_zeros(len(query)) if slab.user_row is None else slab.user_row[query]
        stored = history.memory_UNLD[user, column, 0]
        x = items.slab_UNF[user, column, : self.width] * ITEM_GAIN
        state, logit, count = _unpack(stored, self.width)
        error = _error(labels.slab_UN[user, column][:, None], logit)
        shared = newest.sum(dim=1, keepdim=True).to(x.dtype).clamp(min=1.0)
        sums = state * torch.sqrt(count + COUNT_PRIOR) / shared[query] + error * x
        counts = count / shared[query] + 1.0
        zeros = x.new_zeros(len(newest), self.width)
        return zeros.index_add(0, query, sums), zeros[:, :1].index_add(0, query, counts)

    def _rows(self, before: ErrorState, logit_B1: Tensor) -> Tensor:
        state = before.state_BP.detach().expand(len(logit_B1), -1)
        count = before.count_B1.expand(len(logit_B1), -1).round()
        high = torch.floor(count / _COUNT_PART)
        parts = [
            logit_B1.to(state.dtype),
            high / _COUNT_SCALE,
            (count - high * _COUNT_PART) / _COUNT_SCALE,
        ]
        pad = state.new_zeros(len(state), self._row_dim - self.width - RESERVED)
        return torch.cat([state, pad, *parts], dim=1)


def _parts(history: History) -> tuple[ItemEmbeddings, RowLabels, WholePast]:
    """What of a history errors are made of; `ModelConfig` sees to it that it is there."""
    if history.items is None or history.labels is None or history.whole is None:
        raise ValueError("errors need the items, labels and whole past of a history")
    return history.items, history.labels, history.whole


def state_width(config: ModelConfig) -> int:
    """P: as many coordinates of an item's embedding as a stored vector has room for."""
    return min(config.feature_dim, config.attention_dim - RESERVED)


def _unpack(stored: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """State ``[..., P]``, logit and count ``[..., 1]`` of stored vectors."""
    logit, high, low = stored[..., -RESERVED:].chunk(RESERVED, dim=-1)
    count = (high * _COUNT_PART + low) * _COUNT_SCALE
    return stored[..., :width], logit, count.clamp(min=0.0)


def _error(label: Tensor, logit: Tensor) -> Tensor:
    """Label minus prediction; 0 where the label (NaN) is not known."""
    return torch.nan_to_num(label - torch.sigmoid(logit))
