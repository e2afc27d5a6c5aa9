"""Popular items: the answer for users of whom nothing is known, and when retrieval is down."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from marm.items import ItemFeatures
from stages.item_filters import ItemFilter, ItemLists, ItemPositions, without
from stages.item_index import Found, last_occurrence


@dataclass(frozen=True)
class PopularItems:
    """Items from most to least popular, each once."""

    items: ItemFeatures
    popularity: NDArray[np.float32]

    @staticmethod
    def ranked(items: ItemFeatures, popularity: NDArray[np.float32]) -> PopularItems:
        """Order ``items`` by popularity; equally popular ones by id, so that replicas agree."""
        if len(popularity) != len(items):
            raise ValueError(
                f"popularity must have one value per item, got {len(popularity)} values for "
                f"{len(items)} items; publish the model again"
            )
        if not np.isfinite(popularity).all():
            raise ValueError("popularity must be finite, got NaN or infinity; publish again")
        kept = last_occurrence(items.item_id)
        order = kept[np.lexsort((items.item_id[kept], -popularity[kept].astype(np.float64)))]
        return PopularItems(items.take(order), popularity[order].astype(np.float32))

    @staticmethod
    def empty() -> PopularItems:
        """No items."""
        return PopularItems(ItemFeatures.empty(), np.empty(0, np.float32))

    def __len__(self) -> int:
        return len(self.items)

    def top(
        self, k: int, exclude: NDArray[np.int64], allow: NDArray[np.int64] | None = None
    ) -> Found:
        """The ``k`` most popular items that are not in ``exclude`` and, with an allow list, are in
        ``allow``."""
        return self.permitted(k, ItemFilter(request=ItemLists.of([exclude], allow)))

    def permitted(self, k: int, item_filter: ItemFilter) -> Found:
        """The ``k`` most popular items that ``item_filter`` lets through."""
        permitted = self._positions.permitted(item_filter)
        if permitted.only is None:
            head = np.arange(min(max(k, 0) + len(permitted.blocked), len(self)))
            index = without(head, permitted.blocked)[: max(k, 0)]
        else:
            index = permitted.only[: max(k, 0)]
        return Found(self.items.take(index), self.popularity[index])

    @cached_property
    def _positions(self) -> ItemPositions:
        return ItemPositions(self.items.item_id)

    def head(self, k: int) -> PopularItems:
        """Only the ``k`` most popular items."""
        return PopularItems(self.items.take(slice(0, k)), self.popularity[:k])
