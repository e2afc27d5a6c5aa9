"""Accumulated prediction errors: what a user's whole past says of a target beyond the model.

An event leaves behind how wrong the model was about it: e = label - prediction, a number that only
a memory can know later. Errors on items that resemble a target correct the target's own prediction.
With the inner product of item vectors x as resemblance, all of a user's past is one vector,

    S_t = sum over events i before t of (e_i - m_i) x_i,    state_t = S_t / sqrt(c_t + prior),

where m_i is the user's mean error until i, so that a model that is wrong about the user says
nothing about items. This is a linear attention whose output at every event is cached as MARM caches
the outputs of its layers (Eq. 7, 8): in the first stored layers. A query reads the newest cached
row, adds that row's own error, known only now, and so sees all of life at a cost that does not
depend on its length. A second layer accumulates what the first one left wrong, by transitions
instead of items (`marm.error_vectors`), and so on in turns.

A layer corrects the prediction below without touching it: no gradient goes down, item vectors are
the layer's own (`ErrorTable`), and they learn as in online matrix factorisation. How much of a
correction counts is learned beside it (`ErrorLayer.share`): where errors tell nothing, none does.

A stored vector of width D holds the state, what the layer's vectors need to be found again, the sum
of errors in the scale of the state, the count c in two parts, each exact in half precision, and the
logit predicted for the event. The state is stored rather than the sum, as it stays small. An event
of which nothing was observed yet adds to the count only, a row that is still raw nothing.
With other feedback known, an unobserved label counts as negative, because a row says no more.

Cascading reads states without these vectors: `marm.error_reading`.

Shape legend: B queries, U users, N slab length, J newest rows, P width of the state, D row width,
T tasks, X numbers kept for the vectors, E corrected predictions, two of each layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marm.config import ModelConfig
from marm.error_reading import NewestStored, whole_past
from marm.error_vectors import RESERVED, ErrorVectors
from marm.interest.interface import History, RowLabels

COUNT_PRIOR = 10.0
"""Events that the normalisation adds to the count: a single error is weak evidence."""

MEAN_PRIOR = 20.0
"""Events without error that the user's mean error begins with."""

MOST_SHARE = 1.5
SHARE_SPEED = 50.0
"""Steps of Adam are small: a share goes from all to little of a correction in some 70 of them."""

_COUNT_PART = 1024.0
_COUNT_SCALE = 256.0


@dataclass(frozen=True)
class ErrorState:
    """What the errors before each query add up to."""

    sum_BP: Tensor  # of centred errors times item vectors; one line for all candidates of a request
    total_B1: Tensor  # of errors
    count_B1: Tensor  # events behind it

    @property
    def scale(self) -> Tensor:
        """What sums are divided by."""
        return torch.sqrt(self.count_B1 + COUNT_PRIOR)

    def centred(self, error_B1: Tensor) -> Tensor:
        """Errors of the events that this is the state before, less their user's mean error; 0
        where the error (NaN) is not known."""
        return torch.nan_to_num(error_B1 - self.total_B1 / (self.count_B1 + MEAN_PRIOR))


class ErrorMemory(nn.Module):
    """Corrects logits layer by layer, and computes the rows that carry the errors on."""

    def __init__(self, config: ModelConfig, widths: list[int]) -> None:
        """``widths`` are the P of the layers."""
        super().__init__()
        self.layers = nn.ModuleList(
            # Errors that are left after two layers are smaller, and mostly noise.
            ErrorLayer(config, width, 1.0 / (layer // 2 + 1))
            for layer, width in enumerate(widths)
        )

    def forward(
        self, logits_BT: Tensor, vectors: tuple[ErrorVectors, ...], history: History
    ) -> tuple[Tensor, list[Tensor]]:
        """Predictions that are trained ``[B, E, T]``, the best one last, and the vectors to save,
        each ``[B, D]``."""
        corrected, rows = [], []
        with torch.autocast(logits_BT.device.type, enabled=False):  # counts need all their digits
            for index, (layer, of) in enumerate(zip(self.layers, vectors, strict=True)):
                below_BT = logits_BT.detach().float()
                correction_BT, row_BD = layer(below_BT, of, history, index)
                logits_BT = below_BT + layer.share * correction_BT.detach()
                corrected += [below_BT + correction_BT, logits_BT]
                rows.append(row_BD)
        return torch.stack(corrected, dim=1), rows


class ErrorLayer(nn.Module):
    """One layer: errors of the prediction below, and their correction."""

    def __init__(self, config: ModelConfig, width: int, initial_weight: float) -> None:
        super().__init__()
        self.width = width
        self.task = config.tasks.index(config.positive_task)
        weight = torch.zeros(len(config.tasks), self.width)
        weight[self.task] = initial_weight
        self.weight = nn.Parameter(weight)
        self.doubt = nn.Parameter(torch.zeros(len(config.tasks)))

    @property
    def share(self) -> Tensor:
        """How much of a correction counts, ``[T]``; all of it to begin with."""
        all_of_it = -math.log(MOST_SHARE - 1.0)
        return MOST_SHARE * torch.sigmoid(all_of_it - SHARE_SPEED * self.doubt)

    def forward(
        self, logits_BT: Tensor, vectors: ErrorVectors, history: History, layer: int
    ) -> tuple[Tensor, Tensor]:
        """Corrections ``[B, T]`` of the logits and the vectors to save ``[B, D]``.

        The errors are those of the logits given: a correction is none of its own past.
        """
        own_B1 = logits_BT[:, self.task : self.task + 1]
        before = self.before(own_B1, vectors, history, layer)
        state_BP = before.sum_BP / before.scale
        correction = (vectors.target_BP * state_BP) @ self.weight.T
        return correction, _pack(before, vectors.kept_BX, own_B1)

    def before(
        self, logit_B1: Tensor, vectors: ErrorVectors, history: History, layer: int
    ) -> ErrorState:
        """The state before each query; ``logit_B1`` are the logits of the block's events."""
        labels, whole = _labels(history), whole_past(history)
        state = self._stored(vectors, history, layer)
        if labels.block_P is None or whole.block_BP is None:
            return state
        past_BB = whole.block_BP.to(logit_B1.dtype)
        error_B1 = labels.block_P[:, None] - torch.sigmoid(logit_B1)
        count_B1 = state.count_B1 + past_BB.sum(dim=1, keepdim=True)
        total_B1 = state.total_B1 + past_BB @ torch.nan_to_num(error_B1)
        centred_B1 = ErrorState(state.sum_BP, total_B1, count_B1).centred(error_B1)
        sum_BP = state.sum_BP + past_BB @ (centred_B1 * vectors.target_BP.detach())
        return ErrorState(sum_BP, total_B1, count_B1)

    def _stored(self, vectors: ErrorVectors, history: History, layer: int) -> ErrorState:
        """The state after the newest memorised rows of each query.

        Simultaneous rows have the same state and did not see each other: each adds its own error.
        """
        newest = NewestStored.of(history, layer)
        if newest is None:
            none = vectors.target_BP.new_zeros(len(whole_past(history).newest_BN), self.width)
            return ErrorState(none, none[:, :1], none[:, :1])
        stored, logit_J1 = _unpack(newest.vectors_JD, self.width)
        label_J1 = _labels(history).slab_UN[newest.user_J, newest.column_J][:, None]
        error_J1 = label_J1 - torch.sigmoid(logit_J1)
        centred, share = stored.centred(error_J1) * vectors.newest_JP, newest.share_J1
        return ErrorState(
            newest.sum(share * stored.sum_BP + centred),
            newest.sum(share * stored.total_B1 + torch.nan_to_num(error_J1)),
            newest.sum(share * stored.count_B1 + 1.0),
        )


def _labels(history: History) -> RowLabels:
    """What errors are told by; `ModelConfig` sees to it that it is there."""
    if history.labels is None:
        raise ValueError("errors need the labels of a history")
    return history.labels


def _pack(before: ErrorState, kept_BX: Tensor, logit_B1: Tensor) -> Tensor:
    count, scale = before.count_B1.round(), before.scale
    high = torch.floor(count / _COUNT_PART)
    low = count - high * _COUNT_PART
    numbers = [before.total_B1 / scale, high / _COUNT_SCALE, low / _COUNT_SCALE, logit_B1]
    parts = [before.sum_BP / scale, kept_BX, *numbers]
    return torch.cat([part.expand(len(logit_B1), -1).to(scale.dtype) for part in parts], dim=1)


def _unpack(stored_JD: Tensor, width: int) -> tuple[ErrorState, Tensor]:
    """The state before the events of stored vectors, and their logits ``[J, 1]``."""
    state = stored_JD[:, :width]
    total, high, low, logit = stored_JD[:, -RESERVED:].chunk(RESERVED, dim=-1)
    count = ((high * _COUNT_PART + low) * _COUNT_SCALE).clamp(min=0.0)
    scale = torch.sqrt(count + COUNT_PRIOR)
    return ErrorState(state * scale, total * scale, count), logit
