"""Sparse features (Eq. 2): embedding tables, and the optimiser that updates their rows.

Only the rows a batch touches are read, get a gradient and are updated, so the cost of a step does
not depend on the size of the table. What all tables share is here; `HashedTable` is the plain one.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from marm.addressing import feature_slots

FEATURE_SALTS = {"item": 1, "author": 2, "tag": 3, "duration": 4, "user": 5, "context": 6}
"""Salts keep equal ids of different features in different rows; part of the stored format."""

INIT_STD = 0.05
"""Of the values that rows begin with."""

ROW_STATE_BYTES = 12
"""Beside its numbers a row has a squared gradient and a place for removing duplicates."""


@dataclass(frozen=True)
class SparseRows:
    """The distinct table rows of one batch, detached from the table.

    ``values`` is a leaf that collects the gradient; `SparseTable.rows_of` says which row is which.
    """

    slots: Tensor  # [R] int64, distinct
    values: Tensor  # [R, F]

    def gather(self, position: Tensor) -> Tensor:
        """Embeddings ``[..., F]`` of positions into ``values``."""
        return nn.functional.embedding(position, self.values)


class SparseTable(nn.Module, ABC):
    """An embedding table. Ids have an *address* that never changes (`slots`) and depends on nothing
    learned, so it can be computed ahead; the row that an address has now is found by `find`."""

    weight: Tensor
    squared_gradient: Tensor

    def __init__(self, weight: Tensor, initial_square: float = 0.0) -> None:
        super().__init__()
        # Buffers, not parameters: gradients are per row and never dense.
        self.register_buffer("weight", weight)
        accumulated = torch.full((len(weight),), initial_square)
        self.register_buffer("squared_gradient", accumulated, persistent=False)
        self._position_of_row = np.zeros(len(weight), np.int64)
        self._scratch_in_use = threading.Lock()  # a server scores in several threads at once

    def initialise(self) -> None:
        """Draw the values that rows begin with, where the constructor did not: called by the model
        that gets the table, when it would have built its own."""

    @abstractmethod
    def slots(self, feature: str, ids: ArrayLike) -> NDArray[np.int64]:
        """Addresses of ``ids`` of one feature, in the shape of ``ids``."""

    @abstractmethod
    def find(self, addresses: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of ``weight`` that the addresses have now, in their shape."""

    @abstractmethod
    def stat_slots(self, addresses: Tensor) -> Tensor:
        """Where item statistics of the addresses are kept, in ``[0, num_slots)``."""

    @abstractmethod
    def observe(self, addresses_BK: Callable[[], Tensor]) -> None:
        """Take note of what the events of all workers had, one event a row; called after they were
        learned, and alike on every worker. A table that has no use for it asks nobody."""

    def rows_of(self, *slot_arrays: NDArray[np.int64]) -> tuple[SparseRows, list[Tensor]]:
        """Distinct rows of all ``slot_arrays`` and, for each array, positions into them."""
        flat = self.find(np.concatenate([array.ravel() for array in slot_arrays]))
        # Deduplicate in O(len) with a scratch map instead of a sort: last writer represents a row.
        order = np.arange(len(flat))
        with self._scratch_in_use:
            self._position_of_row[flat] = order
            representative = self._position_of_row[flat]
        is_first = representative == order
        position = (np.cumsum(is_first) - 1)[representative]
        slots = torch.from_numpy(flat[is_first]).to(self.weight.device)
        rows = SparseRows(slots, self.weight[slots].requires_grad_(torch.is_grad_enabled()))
        ends = np.cumsum([array.size for array in slot_arrays])[:-1]
        parts = np.split(position, ends)
        return rows, [
            torch.from_numpy(part.reshape(array.shape)).to(self.weight.device)
            for part, array in zip(parts, slot_arrays, strict=True)
        ]

    @torch.no_grad()
    def apply_gradient(
        self, slots: Tensor, gradient: Tensor, learning_rate: float, epsilon: float = 1e-8
    ) -> None:
        """Row-wise Adagrad: one accumulated mean square per row (distinct ``slots``)."""
        squared = self.squared_gradient[slots] + gradient.square().mean(dim=1)
        self.squared_gradient[slots] = squared
        scale = learning_rate / (squared.sqrt() + epsilon)
        self.weight[slots] -= gradient * scale[:, None]


class HashedTable(SparseTable):
    """``num_slots`` rows addressed by hashed (feature, id) pairs: never grows, and ids collide.

    Ids never seen before are served and learned like any other.
    """

    def __init__(
        self,
        num_slots: int,
        feature_dim: int,
        init_std: float = INIT_STD,
        initial_square: float = 0.0,
    ) -> None:
        super().__init__(torch.randn(num_slots, feature_dim).mul_(init_std), initial_square)
        self.num_slots = num_slots

    @staticmethod
    def addresses(feature: str, ids: ArrayLike, num_slots: int) -> NDArray[np.int64]:
        """See `SparseTable.slots`: here the rows themselves."""
        array = np.asarray(ids)
        flat = feature_slots(FEATURE_SALTS[feature], array.ravel(), num_slots)
        return flat.reshape(array.shape)

    @staticmethod
    def needed_bytes(num_slots: int, feature_dim: int, num_shards: int = 1) -> int:
        """What a table takes, with its optimiser, on each worker that its rows are spread over."""
        return -(-num_slots // num_shards) * (4 * feature_dim + ROW_STATE_BYTES)

    def slots(self, feature: str, ids: ArrayLike) -> NDArray[np.int64]:
        """See `SparseTable.slots`."""
        return self.addresses(feature, ids, self.num_slots)

    def find(self, addresses: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `SparseTable.find`: the addresses themselves."""
        return addresses

    def stat_slots(self, addresses: Tensor) -> Tensor:
        """See `SparseTable.stat_slots`: the addresses themselves."""
        return addresses

    def observe(self, addresses_BK: Callable[[], Tensor]) -> None:
        """See `SparseTable.observe`: every id has its row from the start."""
