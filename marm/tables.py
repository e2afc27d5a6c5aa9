"""Which embedding table a model has: by configuration, behind one interface."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from marm.admitted_table import AdmittedTable
from marm.config import ModelConfig
from marm.sparse import HashedTable, SparseTable

_TABLES: dict[str, type[HashedTable] | type[AdmittedTable]] = {
    "hashed": HashedTable,
    "admitted": AdmittedTable,
}


def build_table(config: ModelConfig) -> SparseTable:
    """A fresh table for a model."""
    table = config.table
    if table.kind == "admitted":
        return AdmittedTable(
            config.num_slots, config.feature_dim, table.admit_after, table.keep_events
        )
    return HashedTable(config.num_slots, config.feature_dim)


def addresses(config: ModelConfig, feature: str, ids: ArrayLike) -> NDArray[np.int64]:
    """`SparseTable.slots` of the model's table, without it."""
    return _TABLES[config.table.kind].addresses(feature, ids, config.num_slots)


def table_bytes(config: ModelConfig, num_shards: int = 1) -> int:
    """What the model's table takes in training, in bytes, on each of the ``num_shards`` workers
    that its rows are spread over."""
    kind = _TABLES[config.table.kind]
    return kind.needed_bytes(config.num_slots, config.feature_dim, num_shards)
