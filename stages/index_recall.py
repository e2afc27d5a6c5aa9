"""How much of the exact answer an item index finds.

Shapes: M items, Q queries, V vector width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stages.item_index import Found, ItemIndex

NUM_QUERIES = 64
QUERY_ITEMS = 3
TIE = 1e-5


def measure_recall(
    index: ItemIndex, reference: ItemIndex, queries_QV: NDArray[np.float32], k: int
) -> float:
    """Share of the ``k`` best items of ``reference`` that ``index`` finds, over all queries."""
    return recall_of(index.search(queries_QV, k), reference.search(queries_QV, k))


def recall_of(found: Sequence[Found], truth: Sequence[Found]) -> float:
    """Share of the true neighbours that were found; 1 when there are none.

    An item as good as the last of the true ones counts: which of several equally good items are
    returned is nobody's mistake, and items that nothing is known of are all equally good.
    """
    wanted = sum(len(true) for true in truth)
    if not wanted:
        return 1.0
    hits = 0
    for one, true in zip(found, truth, strict=True):
        if len(true):
            hits += min(len(true), int((one.scores >= true.scores[-1] - TIE).sum()))
    return hits / wanted


def sample_queries(
    vectors_MV: NDArray[np.float32], num_queries: int = NUM_QUERIES, seed: int = 0
) -> NDArray[np.float32]:
    """Queries like those of users of mixed taste: unit means of a few items' vectors, ``[Q, V]``.

    They lie between clusters of items, which is harder for an index than asking with one item.
    """
    rng = np.random.default_rng(seed)
    picked = rng.integers(0, len(vectors_MV), (num_queries, QUERY_ITEMS))
    queries = vectors_MV[picked].mean(axis=1)
    length = np.linalg.norm(queries, axis=1, keepdims=True)
    unit: NDArray[np.float32] = (queries / np.maximum(length, 1e-12)).astype(np.float32)
    return unit
