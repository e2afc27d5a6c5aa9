"""Search of the nearest items to user vectors, behind one small interface.

Shapes: M items, Q queries, V vector width, K results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from marm.items import ItemFeatures
from stages.item_filters import EVERY_ITEM, ItemFilter

MAX_FOUND = 10_000
"""The most items that one search may be asked for."""


@dataclass(frozen=True)
class Found:
    """Result of a search for one query: items best first, with their scores."""

    items: ItemFeatures
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.items)

    @staticmethod
    def nothing() -> Found:
        """No items."""
        return Found(ItemFeatures.empty(), np.empty(0, np.float32))


class ItemIndex(Protocol):
    """Maximum inner product search over item vectors."""

    def __len__(self) -> int: ...

    @property
    def width(self) -> int:
        """V, the width of the vectors."""
        ...

    def search(
        self, queries_QV: NDArray[np.float32], k: int, item_filter: ItemFilter = EVERY_ITEM
    ) -> list[Found]:
        """The ``k`` best permitted items of every query, best first, each item once.

        Fewer only when fewer are permitted: a filter never costs results, also where the index is
        approximate. Any number of threads may search at once.

        Raises:
            ValueError: when the queries are not finite and ``[Q, V]``, or k is above `MAX_FOUND`.
        """
        ...


def best_of(found: Sequence[Found], k: int) -> Found:
    """The ``k`` best items of several results, each item once with its best score.

    Exact when every result has the ``k`` best of its query: an item among the ``k`` best by best
    score is among the ``k`` best of the query that gives this score.
    """
    if len(found) == 1 and len(found[0]) <= k:
        return found[0]
    scores = np.concatenate([np.empty(0, np.float32), *(part.scores for part in found)])
    item_ids = np.concatenate([np.empty(0, np.int64), *(part.items.item_id for part in found)])
    order = np.argsort(-scores, kind="stable")
    _, first = np.unique(item_ids[order], return_index=True)
    best = order[np.sort(first)[: max(k, 0)]]
    columns = ("item_id", "author_id", "tag_id", "duration_ms")
    items = ItemFeatures(
        *(
            np.concatenate([np.empty(0, np.int64), *(getattr(p.items, name) for p in found)])[best]
            for name in columns
        )
    )
    return Found(items, scores[best])


def last_occurrence(item_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of the last occurrence of every id, in ascending order."""
    _, from_end = np.unique(item_ids[::-1], return_index=True)
    return np.sort(len(item_ids) - 1 - from_end)


def check_vectors(items: ItemFeatures, vectors_MV: NDArray[np.float32]) -> None:
    """Refuse vectors that cannot be searched."""
    if vectors_MV.ndim != 2 or len(vectors_MV) != len(items) or vectors_MV.shape[1] < 1:
        raise ValueError(
            f"item vectors must be [{len(items)}, V] for {len(items)} items, "
            f"got {list(vectors_MV.shape)}; publish the model again"
        )
    if not np.isfinite(vectors_MV).all():
        raise ValueError("item vectors must be finite, got NaN or infinity; train the model again")


def check_search(queries_QV: NDArray[np.float32], k: int, width: int) -> NDArray[np.float32]:
    """The queries as the search wants them; refuses what it could not answer."""
    queries = np.ascontiguousarray(queries_QV, np.float32)
    if queries.ndim != 2 or queries.shape[1] != width:
        raise ValueError(
            f"queries must be [Q, {width}], got {list(queries.shape)}; "
            "use the user vectors of the model that made the index"
        )
    if not np.isfinite(queries).all():
        raise ValueError("queries must be finite, got NaN or infinity; pin an earlier version")
    if k > MAX_FOUND:
        raise ValueError(f"k must be at most {MAX_FOUND}, got {k}; ask for fewer candidates")
    return queries
