"""The rows that offline scores are computed from, and whether serving saw the same."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.lookup import ALL_ROWS
from marm.memory import UserRows
from marm.model_factory import Model
from marm.search import RowSearch
from stages.depth import first_layers
from stages.request import RowsRead


class RowReader(Protocol):
    """The part of a memory that an audit reads."""

    def fetch_available(
        self, user_ids: NDArray[np.int64], n: int
    ) -> tuple[UserRows, NDArray[np.bool_]]:
        """See `stages.history.MemoryReader.fetch_available`."""
        ...


class OfflineHistory:
    """All rows of users, of the past and of the future."""

    def __init__(self, memory: RowReader) -> None:
        self._memory = memory

    def rows(self, user_id: int) -> UserRows:
        """All rows of a user."""
        return self._memory.fetch_available(np.array([user_id], np.int64), ALL_ROWS)[0]

    def changed(self, rows: UserRows) -> bool:
        """Whether the user's rows are others now."""
        (user_id,) = rows.user_ids.tolist()
        return self.rows(user_id).rows.tobytes() != rows.rows.tobytes()

    @staticmethod
    def as_read(rows: UserRows, read: RowsRead) -> UserRows:
        """The rows with as many layers as serving read."""
        return first_layers(rows, min(read.depth, rows.rows.dtype["memory"].shape[0]))


def comparable(
    rows: UserRows, now_ms: int, read: RowsRead, model: Model, search: RowSearch | None
) -> str:
    """Why serving did not see the rows that ``model`` was trained to see; empty when it did.

    ``search`` is what the arm names in place of the model's own; None: nothing.
    """
    past = int((rows.rows["timestamp_ms"] < now_ms).sum())
    expected = min(past, model.config.history_length)
    if read.missing:
        return "the user's memory shard did not answer"
    if read.raw + read.memorised != expected:
        return f"read {read.raw + read.memorised} rows instead of {expected}"
    trained = model.trained_search
    if search is None or search == trained:
        return ""
    if search.takes_all(expected) and trained.takes_all(expected):
        return ""
    return f"the arm attends to {search} (search_top_k), and training to {trained}"
