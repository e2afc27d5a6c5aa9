"""The placement of tables whose rows are spread over the workers (needs the extra `sharded`)."""

from __future__ import annotations

import torch.distributed as dist

from marm.config import ModelConfig
from marm.model_factory import Model, build_model, build_unfilled
from marm.sparse import SparseRows, SparseTable
from train.collective import Collective
from train.config import TrainConfig
from train.sharded_tables import (
    ShardedAdmittedTable,
    ShardedHashedTable,
    ShardedRows,
    ShardedTable,
)
from train.table_placement import TablePlacement, WholeWeights

_WEIGHT = "table.weight"

_TABLES: dict[str, type[ShardedHashedTable] | type[ShardedAdmittedTable]] = {
    "hashed": ShardedHashedTable,
    "admitted": ShardedAdmittedTable,
}


class ShardedTables(TablePlacement):
    """Every row on one worker, in equal runs of rows."""

    def __init__(self, config: TrainConfig, collective: Collective) -> None:
        super().__init__(config, collective)
        if not dist.is_initialized():  # torchrec wants one, also of one process
            backend = "nccl" if config.device == "cuda" else "gloo"
            # In this process alone: no port and no file.
            store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not say it exports
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        if dist.get_world_size() != collective.world_size:
            raise ValueError(
                f"expected a process group of the {collective.world_size} worker(s) of the run, "
                f"got one of {dist.get_world_size()}"
            )

    def build(self, model: ModelConfig) -> Model:
        """See `TablePlacement.build`."""
        learning_rate = self._config.sparse_learning_rate
        table = _TABLES[model.table.kind](model, learning_rate, self._device)
        return build_model(model, table).to(self._device)

    def update(self, table: SparseTable, rows: SparseRows) -> None:
        """See `TablePlacement.update`."""
        assert isinstance(rows, ShardedRows)
        _sharded(table).learn(rows)

    def held_rows(self, table: SparseTable) -> slice:
        """See `TablePlacement.held_rows`."""
        return _sharded(table).held

    def whole_weights(self, model: Model) -> WholeWeights | None:
        """See `TablePlacement.whole_weights`."""
        gathered = _sharded(model.table).gathered(self._collective)
        if gathered is None:
            return None
        weight, squared_gradient = gathered
        return WholeWeights({**model.state_dict(), _WEIGHT: weight}, squared_gradient)

    def whole_model(self, model: Model) -> Model | None:
        """See `TablePlacement.whole_model`: a plain model on the CPU."""
        whole = self.whole_weights(model)
        if whole is None:
            return None
        plain = build_unfilled(model.config)
        weights = {name: tensor.cpu() for name, tensor in whole.weights.items()}
        plain.load_state_dict(weights, assign=True)
        return plain


def _sharded(table: SparseTable) -> ShardedTable:
    assert isinstance(table, ShardedTable)
    return table
