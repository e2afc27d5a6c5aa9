"""Accumulated prediction errors: what a user's whole past says of a target beyond the model.

An event leaves behind how wrong the model was about it: e = label - prediction, a number that only
a memory can know later. Errors on items that resemble a target correct the target's own prediction.
With the inner product of item vectors x as resemblance, all of a user's past is one vector,

    S_t = sum over events i before t of (e_i - m_i) x_i,    state_t = S_t / sqrt(c_t + prior),

where m_i is the user's mean error until i, so that a model that is wrong about the user says
nothing about items. This is a linear attention whose output at every event is cached as MARM caches
the outputs of its layers (Eq. 7, 8): in the first stored layers. A query reads the newest cached
row, adds that row's own error, known only now, and so sees all of life at a cost that does not
depend on its length. A second layer accumulates what the first one left wrong, and so on.

A layer corrects the prediction below without touching it: no gradient goes down, item vectors are
the layer's own (`ErrorVectors`), and they learn as in online matrix factorisation. How much of a
correction counts is learned beside it (`ErrorLayer.share`): where errors tell nothing, none does.

A stored vector of width D holds the state (D - 4 numbers), the sum of errors in the same scale, the
logit predicted for the event, and the count c in two parts, each exact in half precision. The state
is stored rather than the sum, as it stays small. An event of which nothing was observed yet adds
nothing; with other feedback known, an unobserved label counts as negative, because a row says no
more.

Shape legend: B queries, U users, N slab length, J newest rows, P width of the state, D row width,
K features of an item, T tasks, E corrected predictions, two of each layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from marm.config import ModelConfig
from marm.inputs import ModelInputs
from marm.interest.interface import History, RowLabels, WholePast
from marm.sparse import HashedTable, SparseRows

RESERVED = 4
"""Numbers of a stored vector that are not the state: sum of errors, logit, two of the count."""

COUNT_PRIOR = 10.0
"""Events that the normalisation adds to the count: a single error is weak evidence."""

MEAN_PRIOR = 20.0
"""Events without error that the user's mean error begins with."""

INITIAL_DEVIATION = 0.1
INITIAL_SQUARE = 0.3
LEARNING_RATE = 0.2
"""Of the item vectors, for gradients summed over events. Large beside the squares of few gradients,
`INITIAL_SQUARE` makes row-wise Adagrad begin as plain descent: an item moves by what it has seen,
and noise about items hardly seen does not become corrections."""

MOST_SHARE = 1.5
SHARE_SPEED = 50.0
"""Steps of Adam are small: a share goes from all to little of a correction in some 70 of them."""

_COUNT_PART = 1024.0
_COUNT_SCALE = 256.0


@dataclass(frozen=True)
class ErrorVectors:
    """Item vectors of one layer, looked up for a batch or a request."""

    sparse: SparseRows
    target_BP: Tensor
    newest_JP: Tensor  # of the rows where `WholePast.newest_BN` is set, in that order


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


class ErrorTable(HashedTable):
    """Item vectors of one layer: sums of vectors of an item's features (`shared_features`), in the
    places where statistics are kept."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.num_slots, state_width(config), INITIAL_DEVIATION, INITIAL_SQUARE)
        # Saved with the model: a checkpoint has one place only for statistics of optimisers, and
        # that is of the embedding table.
        self.register_buffer("squared_gradient", self.squared_gradient)

    def look_up(self, target_BK: NDArray[np.int64], newest_JK: NDArray[np.int64]) -> ErrorVectors:
        """Vectors of targets and of newest rows; only those of targets learn."""
        rows, (position,) = self.rows_of(target_BK)
        newest = self.weight[torch.from_numpy(newest_JK).to(self.weight.device)]
        return ErrorVectors(rows, rows.gather(position).sum(dim=1), newest.sum(dim=1))


class ErrorMemory(nn.Module):
    """Corrects logits layer by layer, and computes the rows that carry the errors on."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ErrorLayer(config, 1.0 / (layer + 1)) for layer in range(config.error_layers)
        )

    def forward(
        self, logits_BT: Tensor, vectors: tuple[ErrorVectors, ...], history: History
    ) -> tuple[Tensor, list[Tensor]]:
        """Predictions that are trained ``[B, E, T]``, the best one last, and the vectors to save,
        each ``[B, D]``."""
        corrected, rows = [], []
        for index, (layer, of) in enumerate(zip(self.layers, vectors, strict=True)):
            below_BT = logits_BT.detach()
            correction_BT, row_BD = layer(below_BT, of, history, index)
            logits_BT = below_BT + layer.share * correction_BT.detach()
            corrected += [below_BT + correction_BT, logits_BT]
            rows.append(row_BD)
        return torch.stack(corrected, dim=1), rows


class ErrorLayer(nn.Module):
    """One layer: errors of the prediction below, and their correction."""

    def __init__(self, config: ModelConfig, initial_weight: float) -> None:
        super().__init__()
        self.width = state_width(config)
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
        return (vectors.target_BP * state_BP) @ self.weight.T, _pack(before, own_B1)

    def before(
        self, logit_B1: Tensor, vectors: ErrorVectors, history: History, layer: int
    ) -> ErrorState:
        """The state before each query; ``logit_B1`` are the logits of the block's events."""
        labels, whole = _parts(history)
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
        slab, (labels, whole) = history.slab, _parts(history)
        newest = whole.newest_BN
        nothing = vectors.target_BP.new_zeros(len(newest), self.width)
        empty = ErrorState(nothing, nothing[:, :1], nothing[:, :1])
        if history.memory_UNLD.shape[2] <= layer or not newest.shape[1]:
            return empty
        query, column = torch.nonzero(newest, as_tuple=True)
        user = query.new_zeros(len(query)) if slab.user_row is None else slab.user_row[query]
        stored, logit_J1 = _unpack(history.memory_UNLD[user, column, layer], self.width)
        error_J1 = labels.slab_UN[user, column][:, None] - torch.sigmoid(logit_J1)
        centred = stored.centred(error_J1) * vectors.newest_JP
        share = 1.0 / newest.sum(dim=1, keepdim=True).to(logit_J1.dtype).clamp(min=1.0)[query]
        return ErrorState(
            empty.sum_BP.index_add(0, query, share * stored.sum_BP + centred),
            empty.total_B1.index_add(
                0, query, share * stored.total_B1 + torch.nan_to_num(error_J1)
            ),
            empty.count_B1.index_add(0, query, share * stored.count_B1 + 1.0),
        )


def newest_rows(inputs: ModelInputs) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """User and column of the slab for each newest row, in the order of `ErrorVectors.newest_JP`."""
    newest_BN = inputs.slab.newest_BN
    assert newest_BN is not None, "built for a model that keeps errors"
    query, column = np.nonzero(newest_BN)
    return inputs.slab.user_row_B[query], column


def shared_features(config: ModelConfig) -> int:
    """K: features that targets and rows both have, the first ones of either: item, author, tag."""
    return sum(name in config.features for name in ("item", "author", "tag"))


def state_width(config: ModelConfig) -> int:
    """P: numbers of a state, as many as a stored vector has room for."""
    return config.attention_dim - RESERVED


def _parts(history: History) -> tuple[RowLabels, WholePast]:
    """What of a history errors are made of; `ModelConfig` sees to it that it is there."""
    if history.labels is None or history.whole is None:
        raise ValueError("errors need the labels and the whole past of a history")
    return history.labels, history.whole


def _pack(before: ErrorState, logit_B1: Tensor) -> Tensor:
    count, scale = before.count_B1.round(), before.scale
    high = torch.floor(count / _COUNT_PART)
    parts = [before.sum_BP / scale, before.total_B1 / scale, high / _COUNT_SCALE]
    low = (count - high * _COUNT_PART) / _COUNT_SCALE
    lines = [part.expand(len(logit_B1), -1) for part in (*parts, low)]
    return torch.cat([*lines, logit_B1.to(lines[0].dtype)], dim=1)


def _unpack(stored_JD: Tensor, width: int) -> tuple[ErrorState, Tensor]:
    """The state before the events of stored vectors, and their logits ``[J, 1]``."""
    state, total, high, low, logit = torch.split(stored_JD, [width, 1, 1, 1, 1], dim=-1)
    count = ((high * _COUNT_PART + low) * _COUNT_SCALE).clamp(min=0.0)
    scale = torch.sqrt(count + COUNT_PRIOR)
    return ErrorState(state * scale, total * scale, count), logit
