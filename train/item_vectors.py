"""Vectors of many items, in passes of bounded memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from marm.items import ItemFeatures
from marm.retriever import Retriever

_ITEMS_PER_PASS = 65_536


def item_vectors(model: Retriever, items: ItemFeatures) -> NDArray[np.float32]:
    """Vectors ``[M, V]`` of all ``items``."""
    starts = range(0, len(items), _ITEMS_PER_PASS)
    parts = [model.item_vectors(items.take(slice(i, i + _ITEMS_PER_PASS))) for i in starts]
    return np.concatenate([np.empty((0, model.config.output_dim), np.float32), *parts])
