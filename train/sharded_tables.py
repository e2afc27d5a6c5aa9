"""Embedding tables whose rows are spread over the workers of a run (needs the extra `sharded`).

A worker holds a share of the rows and of the optimiser's state, and asks the others for what its
batch needs. Addresses, the directory of the admitted table and item statistics are whole on every
worker, as they are with `train.table_placement.ReplicatedTables`, and so are the results up to
rounding. Checkpoints and published versions are gathered on worker 0, in the same format.

Shape legend: R rows of a batch, S rows held here, P places, F feature dim.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marm.admitted_table import NUM_SHARED, AdmittedTable
from marm.config import ModelConfig
from marm.sparse import INIT_STD, HashedTable, SparseRows, SparseTable
from train.collective import Collective
from train.row_shards import RowShards
from train.table_placement import gradient_of

_CHUNK_ROWS = 1 << 16


@dataclass(frozen=True)
class ShardedRows(SparseRows):
    """Rows of a batch that came from their owners."""

    looked_up_RF: Tensor  # ``values`` before they were detached: its backward pass learns


class ShardedTable(SparseTable):
    """Part of a table: ``weight`` and ``squared_gradient`` are the rows that this worker holds."""

    _shards: RowShards
    num_rows: int

    def _hold(self, learning_rate: float, feature_dim: int, device: torch.device) -> None:
        """Exchange the whole table, which was built without memory, for this worker's share."""
        self.num_rows = len(self.weight)
        self._shards = RowShards(self.num_rows, feature_dim, learning_rate, device)
        self.weight = self._shards.values_SF.detach()
        self.squared_gradient = self._shards.squared_gradient_S.detach()

    @abstractmethod
    def initialise(self) -> None:
        """Draw the values that a whole table of the kind would have begun with."""

    @abstractmethod
    def _rows(self, addresses: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the whole table that the addresses have now."""

    @property
    def held(self) -> slice:
        """The rows of the whole table that are here."""
        return slice(self._shards.first_row, self._shards.first_row + len(self.weight))

    def find(self, addresses: NDArray[np.int64]) -> NDArray[np.int64]:
        """Not here: rows found this way would be read from ``weight``, which has only a part.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "rows of a sharded table are on several workers; read them with rows_of, which all "
            "workers call, or ask the whole model (Learner.whole_model)"
        )

    def rows_of(self, *slot_arrays: NDArray[np.int64]) -> tuple[SparseRows, list[Tensor]]:
        """See `SparseTable.rows_of`; a collective call."""
        flat = self._rows(np.concatenate([array.ravel() for array in slot_arrays]))
        distinct, position = np.unique(flat, return_inverse=True)
        device = self.weight.device
        slots = torch.from_numpy(distinct).to(device)
        looked_up_RF = self._shards.look_up(slots)
        values = looked_up_RF.detach().requires_grad_(torch.is_grad_enabled())
        ends = np.cumsum([array.size for array in slot_arrays])[:-1]
        return ShardedRows(slots, values, looked_up_RF), [
            torch.from_numpy(part.reshape(array.shape)).to(device)
            for part, array in zip(np.split(position, ends), slot_arrays, strict=True)
        ]

    def apply_gradient(
        self, slots: Tensor, gradient: Tensor, learning_rate: float, epsilon: float = 1e-8
    ) -> None:
        """Not here: see `learn`.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("rows of a sharded table learn by `learn`, which all workers call")

    def learn(self, rows: ShardedRows) -> None:
        """Row-wise Adagrad on the rows of all workers; a collective call."""
        torch.autograd.backward([rows.looked_up_RF], [gradient_of(rows)])

    def _fill(self, first_row: int, rows_RF: Tensor) -> None:
        """Keep what is held here of rows of the whole table."""
        low, high = max(first_row, self.held.start), min(first_row + len(rows_RF), self.held.stop)
        if low < high:
            here = slice(low - self.held.start, high - self.held.start)
            self.weight[here] = rows_RF[low - first_row : high - first_row]

    def gathered(self, collective: Collective) -> tuple[Tensor, Tensor] | None:
        """All rows ``[num_rows, F]`` and their squared gradients, in main memory of worker 0; None
        elsewhere. A collective call, in parts of bounded size."""
        if collective.rank != 0:
            for start in self._starts():
                for own in (self.weight, self.squared_gradient):
                    collective.concat(own[start : start + _CHUNK_ROWS])
            return None
        weight = torch.empty(self.num_rows, self.weight.shape[1])
        squared_gradient = torch.empty(self.num_rows)
        for start in self._starts():
            for own, whole in ((self.weight, weight), (self.squared_gradient, squared_gradient)):
                parts = collective.concat(own[start : start + _CHUNK_ROWS])
                for place, part in self._parts(start, parts, collective.world_size):
                    whole[place] = part.cpu()
        return weight, squared_gradient

    def _starts(self) -> range:
        return range(0, self._shards.rows_per_worker, _CHUNK_ROWS)

    def _parts(self, start: int, rows: Tensor, world_size: int) -> Iterator[tuple[slice, Tensor]]:
        """What each worker sent of its rows from ``start`` on, and where it belongs."""
        share, taken = self._shards.rows_per_worker, 0
        for rank in range(world_size):
            first = rank * share + start
            end = min((rank + 1) * share, self.num_rows, first + _CHUNK_ROWS)
            count = max(0, end - first)
            yield slice(first, first + count), rows[taken : taken + count]
            taken += count


class ShardedHashedTable(ShardedTable, HashedTable):
    """`HashedTable` over the workers of a run."""

    def __init__(self, model: ModelConfig, learning_rate: float, device: torch.device) -> None:
        with torch.device("meta"):
            HashedTable.__init__(self, model.num_slots, model.feature_dim)
        self._hold(learning_rate, model.feature_dim, device)

    @torch.no_grad()
    def initialise(self) -> None:
        """See `ShardedTable.initialise`: drawn in parts, which continue one another as torch draws
        16 normal numbers at a time. All but the last are multiples of that, and none is less."""
        start = 0
        for end in [*range(_CHUNK_ROWS, self.num_rows - 16, _CHUNK_ROWS), self.num_rows]:
            self._fill(start, torch.randn(end - start, self.weight.shape[1]).mul_(INIT_STD))
            start = end

    def _rows(self, addresses: NDArray[np.int64]) -> NDArray[np.int64]:
        return HashedTable.find(self, addresses)


class ShardedAdmittedTable(ShardedTable, AdmittedTable):
    """`AdmittedTable` over the workers of a run: which id has which row is known to all of them."""

    def __init__(self, model: ModelConfig, learning_rate: float, device: torch.device) -> None:
        table = model.table
        with torch.device("meta"):
            AdmittedTable.__init__(
                self, model.num_slots, model.feature_dim, table.admit_after, table.keep_events
            )
        self._hold(learning_rate, model.feature_dim, device)
        for name in ("ids", "counts", "seen_at", "num_seen"):
            setattr(self, name, torch.zeros_like(getattr(self, name), device=device))
        self._shared_rows: Tensor | None = None

    @torch.no_grad()
    def initialise(self) -> None:
        """See `ShardedTable.initialise`: only shared rows have values."""
        self.weight.zero_()
        self._fill(0, torch.zeros(NUM_SHARED, self.weight.shape[1]).normal_(std=INIT_STD))

    def _rows(self, addresses: NDArray[np.int64]) -> NDArray[np.int64]:
        return AdmittedTable.find(self, addresses)

    def observe(self, addresses_BK: Callable[[], Tensor]) -> None:
        """See `SparseTable.observe`; a collective call."""
        self._shared_rows = None
        super().observe(addresses_BK)

    def _admit(self, place: Tensor) -> None:
        # All workers admit the same places, so all of them ask for the shared rows, or none does.
        if not len(place):
            return
        if self._shared_rows is None:
            self._shared_rows = self._shards.look_up(torch.arange(NUM_SHARED))
        row = NUM_SHARED + place
        is_here = (row >= self.held.start) & (row < self.held.stop)
        here = row[is_here] - self.held.start
        shared = self.ids[place[is_here]] & (NUM_SHARED - 1)
        self.weight[here] = self._shared_rows[shared]
        self.squared_gradient[here] = 0.0
