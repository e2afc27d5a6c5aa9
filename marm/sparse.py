"""Sparse features (Eq. 2): one hashed embedding table, and the optimiser that updates its rows.

Only the rows a batch touches are read, get a gradient and are updated, so the cost of a step does
not depend on the size of the table. Ids are hashed, so ids never seen before are served and learned
like any other.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from marm.addressing import feature_slots

FEATURE_SALTS = {"item": 1, "author": 2, "tag": 3, "duration": 4, "user": 5, "context": 6}
"""Salts keep equal ids of different features in different rows; part of the stored format."""


@dataclass(frozen=True)
class SparseRows:
    """The distinct table rows of one batch, detached from the table.

    ``values`` is a leaf that collects the gradient; `HashedTable.rows_of` says which row is which.
    """

    slots: Tensor  # [R] int64, distinct
    values: Tensor  # [R, F]

    def gather(self, position: Tensor) -> Tensor:
        """Embeddings ``[..., F]`` of positions into ``values``."""
        return nn.functional.embedding(position, self.values)


class HashedTable(nn.Module):
    """Embedding table ``[num_slots, F]`` addressed by hashed (feature, id) pairs."""

    weight: Tensor
    squared_gradient: Tensor

    def __init__(self, num_slots: int, feature_dim: int, init_std: float = 0.05) -> None:
        super().__init__()
        self.num_slots = num_slots
        # Buffers, not parameters: gradients are per row and never dense.
        self.register_buffer("weight", torch.randn(num_slots, feature_dim) * init_std)
        self.register_buffer("squared_gradient", torch.zeros(num_slots), persistent=False)
        self._position_of_slot = np.zeros(num_slots, np.int64)
        self._scratch_in_use = threading.Lock()  # a server scores in several threads at once

    def slots(self, feature: str, ids: ArrayLike) -> NDArray[np.int64]:
        """Table rows of ``ids`` of one feature, in the shape of ``ids``."""
        array = np.asarray(ids)
        return feature_slots(FEATURE_SALTS[feature], array.ravel(), self.num_slots).reshape(
            array.shape
        )

    def rows_of(self, *slot_arrays: NDArray[np.int64]) -> tuple[SparseRows, list[Tensor]]:
        """Distinct rows of all ``slot_arrays`` and, for each array, positions into them."""
        flat = np.concatenate([array.ravel() for array in slot_arrays])
        # Deduplicate in O(len) with a scratch map instead of a sort: last writer represents a slot.
        order = np.arange(len(flat))
        with self._scratch_in_use:
            self._position_of_slot[flat] = order
            representative = self._position_of_slot[flat]
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
