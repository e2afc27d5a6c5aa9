"""The vectors by which errors are kept and asked for: one table for each layer of errors.

Layers take turns: the first, third, ... layer knows an event by its item, the second, fourth, ...
by its transition (`marm.transitions`). Vectors learn as in online matrix factorisation, see
`marm.error_memory`.

Shape legend: B queries, J newest rows, P width of a state, K features of an item, X numbers that a
row keeps beside a state.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marm.config import ModelConfig
from marm.inputs import ModelInputs
from marm.sparse import HashedTable, SparseRows

Places = Callable[[NDArray[np.int64]], NDArray[np.int64]]

NewestRows = tuple[NDArray[np.int64], NDArray[np.int64]]

RESERVED = 4
"""Numbers of a stored vector that every layer needs beside the state: see `marm.error_memory`."""

INITIAL_DEVIATION = 0.1
INITIAL_SQUARE = 0.3
"""Of the row-wise Adagrad of vectors. Large beside the squares of few gradients, summed over
events, it makes that begin as plain descent: an item moves by what it has seen, and noise about
items hardly seen does not become corrections."""

_PARTS = 3
_PART = 1024
_PART_SCALE = 256.0


@dataclass(frozen=True)
class ErrorVectors:
    """Vectors of one layer, looked up for a batch or a request."""

    sparse: SparseRows
    target_BP: Tensor
    newest_JP: Tensor  # of the rows where `WholePast.newest_BN` is set, in that order
    kept_BX: Tensor  # what a row keeps so that its vector is found again


class ErrorTable(HashedTable):
    """Vectors of one layer, in as many places as the embedding table has."""

    kept = 0  # X

    def __init__(self, config: ModelConfig) -> None:
        width = _state_width(config, type(self))
        super().__init__(config.num_slots, width, INITIAL_DEVIATION, INITIAL_SQUARE)
        # Saved with the model: a checkpoint has one place only for statistics of optimisers, and
        # that is of the embedding table.
        self.register_buffer("squared_gradient", self.squared_gradient)

    @abstractmethod
    def look_up(
        self, inputs: ModelInputs, newest: NewestRows, places: Places, layer: int
    ) -> ErrorVectors:
        """Vectors of targets and of newest rows; only those of targets learn.

        Args:
            inputs: what is asked, and the rows.
            newest: see `newest_rows`.
            places: where the addresses of features are in this table.
            layer: which stored layer it is.
        """

    def _look_up(
        self,
        target_BK: NDArray[np.int64],
        newest_JK: NDArray[np.int64],
        kept_BX: NDArray[np.float32],
    ) -> ErrorVectors:
        rows, (position,) = self.rows_of(target_BK)
        device = self.weight.device
        newest = self.weight[torch.from_numpy(newest_JK).to(device)].sum(dim=1)
        kept = torch.from_numpy(kept_BX).to(device)
        return ErrorVectors(rows, rows.gather(position).sum(dim=1), newest, kept)


class ItemErrors(ErrorTable):
    """An event is its item: the sum of vectors of the features that targets and rows both have, the
    first ones of either: item, author and tag."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self._num_features = sum(name in config.features for name in ("item", "author", "tag"))

    def look_up(
        self, inputs: ModelInputs, newest: NewestRows, places: Places, layer: int
    ) -> ErrorVectors:
        """See `ErrorTable.look_up`."""
        user, column = newest
        target_BK = places(inputs.target_slots_BK[:, : self._num_features])
        newest_JK = places(inputs.slab.slots_UNK[user, column, : self._num_features])
        return self._look_up(target_BK, newest_JK, np.empty((len(inputs), 0), np.float32))


class TransitionErrors(ErrorTable):
    """An event is its transition. Rows keep the place of theirs, in parts exact in half precision:
    what was liked before them may be out of sight when they are read."""

    kept = _PARTS

    def look_up(
        self, inputs: ModelInputs, newest: NewestRows, places: Places, layer: int
    ) -> ErrorVectors:
        """See `ErrorTable.look_up`."""
        target_B = inputs.transition_slots_B
        assert target_B is not None, "built for a model that keeps transitions"
        user, column = newest
        memory = inputs.slab.memory_UNLD
        # A request may be answered with fewer layers than the model has.
        kept = self.weight.shape[1] + np.arange(_PARTS)
        known = layer < memory.shape[2]
        nowhere = np.zeros((len(user), _PARTS), np.float32)
        parts = memory[user, column, layer][:, kept] if known else nowhere
        newest_J = np.minimum(_joined(parts), len(self.weight) - 1)
        return self._look_up(target_B[:, None], newest_J[:, None], _parted(target_B))


def error_tables(config: ModelConfig) -> list[ErrorTable]:
    """A table for each layer of errors, of the model that keeps them."""
    return [kind(config) for kind in _kinds(config)]


def error_table_bytes(config: ModelConfig) -> int:
    """What `error_tables` take, with their optimiser, on every worker; nothing for models that only
    read errors."""
    if not config.keeps_errors:
        return 0
    return sum(HashedTable.needed_bytes(config.num_slots, p) for p in state_widths(config))


def state_widths(config: ModelConfig) -> list[int]:
    """P of each layer of errors: as many numbers as a stored vector has room for. The same for the
    model that keeps them and those that read them, which `TrainConfig` sees to."""
    return [_state_width(config, kind) for kind in _kinds(config)]


def _kinds(config: ModelConfig) -> list[type[ErrorTable]]:
    turns: list[type[ErrorTable]] = [ItemErrors]
    if "tag" in config.features:
        turns.append(TransitionErrors)
    return [turns[layer % len(turns)] for layer in range(config.error_layers)]


def _state_width(config: ModelConfig, kind: type[ErrorTable]) -> int:
    return config.namespace.dim - RESERVED - kind.kept


def newest_rows(inputs: ModelInputs) -> NewestRows:
    """User and column of the slab for each newest row, in the order of `ErrorVectors.newest_JP`."""
    newest_BN = inputs.slab.newest_BN
    assert newest_BN is not None, "built for a model that keeps errors"
    query, column = np.nonzero(newest_BN)
    return inputs.slab.user_row_B[query], column


def _parted(places: NDArray[np.int64]) -> NDArray[np.float32]:
    digits = [places // _PART**power % _PART for power in range(_PARTS)]
    return (np.stack(digits, axis=-1) / _PART_SCALE).astype(np.float32)


def _joined(parts: NDArray[np.float32]) -> NDArray[np.int64]:
    digits = np.rint(parts * _PART_SCALE).astype(np.int64).clip(0, _PART - 1)
    return digits @ (_PART ** np.arange(_PARTS))
