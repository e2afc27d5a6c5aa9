"""Search of the nearest items to a user vector, behind one small interface.

Shapes: M items, Q queries, V vector width, K results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

from marm.items import ItemFeatures


@dataclass(frozen=True)
class Found:
    """Result of a search for one query: items best first, with their scores."""

    items: ItemFeatures
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.items)


class ItemIndex(Protocol):
    """Maximum inner product search over item vectors."""

    def __len__(self) -> int: ...

    @property
    def width(self) -> int:
        """V, the width of the vectors."""
        ...

    def search(self, queries_QV: NDArray[np.float32], k: int) -> list[Found]:
        """The at most ``k`` best items of every query, best first, each item once."""
        ...


class ExactItemIndex:
    """Every item is compared: the reference that approximate indexes are measured against."""

    def __init__(self, items: ItemFeatures, vectors_MV: NDArray[np.float32]) -> None:
        """Index ``items``; of an id that occurs twice the last vector counts."""
        check_vectors(items, vectors_MV)
        kept = last_occurrence(items.item_id)
        self._items = items.take(kept)
        self._index = faiss.IndexFlatIP(vectors_MV.shape[1])
        if len(kept):
            self._index.add(np.ascontiguousarray(vectors_MV[kept], np.float32))

    def __len__(self) -> int:
        return len(self._items)

    @property
    def width(self) -> int:
        """See `ItemIndex.width`."""
        return int(self._index.d)

    def search(self, queries_QV: NDArray[np.float32], k: int) -> list[Found]:
        """See `ItemIndex.search`."""
        queries = np.ascontiguousarray(queries_QV, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise ValueError(
                f"queries must be [Q, {self.width}], got {list(queries.shape)}; "
                "use the user vectors of the model that made the index"
            )
        k = min(k, len(self))
        if k <= 0:
            nothing = Found(ItemFeatures.empty(), np.empty(0, np.float32))
            return [nothing] * len(queries)
        scores_QK, positions_QK = self._index.search(queries, k)
        return [
            Found(self._items.take(positions), scores)
            for positions, scores in zip(positions_QK, scores_QK, strict=True)
        ]


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


IndexFactory = Callable[[ItemFeatures, NDArray[np.float32]], ItemIndex]

INDEX_KINDS: dict[str, IndexFactory] = {"exact": ExactItemIndex}
"""Kinds of index by the name used in the configuration."""


def build_item_index(kind: str, items: ItemFeatures, vectors_MV: NDArray[np.float32]) -> ItemIndex:
    """An index of the configured ``kind``."""
    factory = INDEX_KINDS.get(kind)
    if factory is None:
        raise ValueError(f"item index must be one of {sorted(INDEX_KINDS)}, got {kind!r}")
    return factory(items, vectors_MV)
