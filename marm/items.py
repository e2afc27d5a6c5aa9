"""Items: the attributes a candidate brings to the model besides its id."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ItemFeatures:
    """``M`` items as columns; 0 stands for an unknown author, tag or duration."""

    item_id: NDArray[np.int64]
    author_id: NDArray[np.int64]
    tag_id: NDArray[np.int64]
    duration_ms: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.item_id)

    def take(self, index: NDArray | slice) -> ItemFeatures:
        """The items at ``index``, in that order."""
        return ItemFeatures(
            self.item_id[index], self.author_id[index], self.tag_id[index], self.duration_ms[index]
        )

    @staticmethod
    def empty() -> ItemFeatures:
        """No items."""
        return ItemFeatures(*(np.empty(0, np.int64) for _ in range(4)))


class ItemCatalog:
    """Exact look-up from item id to features; ids it does not know get zeros, not an error."""

    def __init__(self, items: ItemFeatures) -> None:
        order = np.argsort(items.item_id, kind="stable")
        ordered = items.take(order)
        # The last entry of an id wins, so a refreshed catalog overrides the older one.
        last = np.append(ordered.item_id[1:] != ordered.item_id[:-1], True)[: len(ordered)]
        self.items = ordered.take(last)

    def __len__(self) -> int:
        return len(self.items)

    def contains(self, item_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of ``item_ids`` the catalog knows."""
        return self._find(item_ids)[1]

    def lookup(self, item_ids: NDArray[np.int64]) -> ItemFeatures:
        """Features of ``item_ids`` in their order; unknown items keep their id with zeros."""
        position, known = self._find(item_ids)
        if not len(self.items):
            zeros = np.zeros(len(item_ids), np.int64)
            return ItemFeatures(np.asarray(item_ids, np.int64), zeros, zeros, zeros)
        found = self.items.take(position)
        return ItemFeatures(
            np.asarray(item_ids, np.int64),
            np.where(known, found.author_id, 0),
            np.where(known, found.tag_id, 0),
            np.where(known, found.duration_ms, 0),
        )

    def _find(self, item_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        if not len(self.items):
            return np.zeros(len(item_ids), np.int64), np.zeros(len(item_ids), np.bool_)
        position = np.searchsorted(self.items.item_id, item_ids)
        position = np.minimum(position, len(self.items) - 1)
        return position, self.items.item_id[position] == item_ids
