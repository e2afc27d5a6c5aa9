"""The items of a stream so far: what retrieval can be asked to find."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from marm.items import ItemFeatures

MAX_ITEMS = 1_000_000
"""Items that are remembered; those first seen later are no candidates."""


class SeenCatalog:
    """Items by their place, the order in which they were first seen."""

    def __init__(self) -> None:
        self._place: dict[int, int] = {}
        self._columns = np.zeros((4, 1024), np.int64)

    def __len__(self) -> int:
        return len(self._place)

    def add(self, items: ItemFeatures) -> NDArray[np.int64]:
        """Places of ``items``, which are added where they are new; -1 when there is no more room.
        Attributes of an item are those it was seen with last."""
        place = self._place
        for item in items.item_id.tolist():
            if item not in place and len(place) < MAX_ITEMS:
                place[item] = len(place)
        self._columns = grown(self._columns, len(place))
        places = self.places(items.item_id)
        known = places >= 0
        columns = (items.item_id, items.author_id, items.tag_id, items.duration_ms)
        self._columns[:, places[known]] = np.stack(columns)[:, known]
        return places

    def places(self, item_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places of ``item_ids``; -1 where an item was not seen."""
        place = self._place
        return np.array([place.get(item, -1) for item in item_ids.tolist()], np.int64)

    def items(self) -> ItemFeatures:
        """All items by place, as they are now."""
        return ItemFeatures(*self._columns[:, : len(self)].copy())

    def state(self) -> NDArray[np.int64]:
        """``[4, M]``; `load` reads it back."""
        return self._columns[:, : len(self)].copy()

    def load(self, state: NDArray[np.int64]) -> None:
        """Continue from `state`."""
        self._place = {item: place for place, item in enumerate(state[0].tolist())}
        self._columns = state.copy()


def grown(array: NDArray, size: int) -> NDArray:
    """``array`` with room for ``size`` places on its last axis; new places are zero."""
    missing = size - array.shape[-1]
    if missing <= 0:
        return array
    more = max(missing, array.shape[-1])
    return np.concatenate([array, np.zeros((*array.shape[:-1], more), array.dtype)], axis=-1)
