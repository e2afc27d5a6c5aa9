"""The item catalog of a source, gathered from its side table and from its events."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from marm.events import EventBatch
from marm.items import ItemCatalog, ItemFeatures

FEATURES = ("author_id", "tag_id", "duration_ms")

_PENDING_ROWS = 1_000_000


class SeenItems:
    """Items as they are seen; memory grows with distinct items, not with events."""

    def __init__(self, side_table: ItemFeatures) -> None:
        self._side_table = ItemCatalog(latest_known(side_table))
        self._merged = self._side_table.items
        self._pending: list[ItemFeatures] = []
        self._num_pending = 0

    def complete(self, events: EventBatch) -> EventBatch:
        """``events`` with what the side table knows of their items, where they don't say it
        themselves; their items are remembered."""
        own = ItemFeatures(events.item_id, events.author_id, events.tag_id, events.duration_ms)
        full = fill_unknown(own, self._side_table.lookup(events.item_id))
        self._remember(latest_known(full))
        return replace(
            events,
            author_id=full.author_id,
            tag_id=full.tag_id,
            duration_ms=full.duration_ms,
        )

    def items(self) -> ItemFeatures:
        """All items so far, by id, each with the last that was known of it."""
        self._merged = latest_known(_concat([self._merged, *self._pending]))
        self._pending, self._num_pending = [], 0
        return self._merged

    def _remember(self, items: ItemFeatures) -> None:
        self._pending.append(items)
        self._num_pending += len(items)
        if self._num_pending > max(_PENDING_ROWS, len(self._merged)):
            self.items()


def latest_known(items: ItemFeatures) -> ItemFeatures:
    """One row per item id, ascending; of each feature the last value that is not unknown."""
    if not len(items):
        return items
    order = np.argsort(items.item_id, kind="stable")
    ids = items.item_id[order]
    starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))

    def last_known(column: NDArray[np.int64]) -> NDArray[np.int64]:
        known_at = np.where(column[order] != 0, np.arange(len(order)), -1)
        last = np.maximum.reduceat(known_at, starts)
        return np.where(last >= 0, column[order][last], 0)

    return ItemFeatures(ids[starts], *(last_known(getattr(items, name)) for name in FEATURES))


def changed_items(known: ItemCatalog, items: ItemFeatures) -> ItemFeatures:
    """Those of ``items`` that ``known`` does not hold as they are, completed with what it holds."""
    before = known.lookup(items.item_id)
    completed = fill_unknown(items, before)
    same = known.contains(items.item_id)
    for name in FEATURES:
        same = same & (getattr(completed, name) == getattr(before, name))
    return completed.take(~same)


def fill_unknown(items: ItemFeatures, fallback: ItemFeatures) -> ItemFeatures:
    """``items`` with features of ``fallback``, row by row, where they are unknown."""
    return ItemFeatures(
        items.item_id,
        *(
            np.where(getattr(items, name) == 0, getattr(fallback, name), getattr(items, name))
            for name in FEATURES
        ),
    )


def _concat(parts: list[ItemFeatures]) -> ItemFeatures:
    return ItemFeatures(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("item_id", *FEATURES)
        )
    )
