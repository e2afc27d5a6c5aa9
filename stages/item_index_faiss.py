"""Item indexes on faiss: what all kinds share, and the exact one.

How a filter is applied. A few hidden items, such as those a user has seen, are found as well and
dropped, which costs an index least. Longer lists become a selector that the search asks per item.
When few items are permitted, only they are compared, exactly; so they are when an approximate
search comes back with too few.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import faiss
import numpy as np
from numpy.typing import NDArray

from marm.items import ItemFeatures
from stages.item_filters import EVERY_ITEM, ItemFilter, ItemPositions, Permitted, is_in
from stages.item_index import Found, check_search, check_vectors, last_occurrence

MAX_DROPPED = 2000
"""Up to so many hidden items are found and dropped; a selector is quicker with more."""

EXACT_SHARE = 0.2
"""Below this share of permitted items only they are compared: an approximate search would wade
through what it may not return."""

GATHERED_POSITIONS = 20_000
"""Up to so many vectors are picked out one by one; beyond, scanning past the others is faster."""

Hits = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Scores and positions, ``[Q, K]``, best first; position -1 where nothing was found."""


class FaissItemIndex(ABC):
    """What the kinds share: items by position, filters, threads."""

    def __init__(
        self, items: ItemFeatures, vectors_MV: NDArray[np.float32], num_threads: int = 1
    ) -> None:
        """Index ``items``; of an id that occurs twice the last vector counts."""
        check_vectors(items, vectors_MV)
        kept = last_occurrence(items.item_id)
        self._items = items.take(kept)
        self._positions = ItemPositions(self._items.item_id)
        self._width = vectors_MV.shape[1]
        self._num_threads = num_threads
        faiss.omp_set_num_threads(num_threads)
        self._build(np.ascontiguousarray(vectors_MV[kept], np.float32))

    def __len__(self) -> int:
        return len(self._items)

    @property
    def width(self) -> int:
        """See `stages.item_index.ItemIndex.width`."""
        return self._width

    def search(
        self, queries_QV: NDArray[np.float32], k: int, item_filter: ItemFilter = EVERY_ITEM
    ) -> list[Found]:
        """See `stages.item_index.ItemIndex.search`."""
        queries = check_search(queries_QV, k, self.width)
        permitted = self._positions.permitted(item_filter)
        k = min(k, permitted.count(len(self)))
        if k <= 0:
            return [Found.nothing()] * len(queries)
        # OpenMP keeps the number of threads per calling thread, and a server has many of those.
        faiss.omp_set_num_threads(self._num_threads)
        scores_QK, positions_QK = self._permitted_hits(queries, k, permitted)
        return [
            Found(self._items.take(positions), scores)
            for positions, scores in zip(positions_QK, scores_QK, strict=True)
        ]

    def _permitted_hits(self, queries: NDArray[np.float32], k: int, permitted: Permitted) -> Hits:
        if permitted.only is None and len(permitted.blocked) <= MAX_DROPPED:
            return self._complete(queries, k, permitted.blocked, None)
        if permitted.count(len(self)) >= EXACT_SHARE * len(self):
            return self._complete(queries, k, NOTHING, permitted)
        return self._scan(queries, k, permitted)

    def _complete(
        self,
        queries: NDArray[np.float32],
        k: int,
        dropped: NDArray[np.int64],
        permitted: Permitted | None,
    ) -> Hits:
        """``k`` hits of every query without those at ``dropped``; queries for which too few were
        found are answered exactly."""
        fetched = k + len(dropped)
        hits, short = first_kept(self._approximate(queries, fetched, permitted), k, dropped)
        if short.any():
            exact, _ = first_kept(self._scan(queries[short], fetched, permitted), k, dropped)
            hits[0][short], hits[1][short] = exact
        return hits

    @abstractmethod
    def _build(self, vectors_MV: NDArray[np.float32]) -> None:
        """Make the faiss index of the vectors at positions 0..M-1; M may be 0."""

    @abstractmethod
    def _scan(self, queries: NDArray[np.float32], k: int, permitted: Permitted | None) -> Hits:
        """The exact answer over all positions, or over those permitted, at least ``k``."""

    @abstractmethod
    def _approximate(
        self, queries: NDArray[np.float32], k: int, permitted: Permitted | None
    ) -> Hits:
        """The answer of this kind of index; it may find fewer than there are."""


class ExactItemIndex(FaissItemIndex):
    """Every item is compared: the reference that approximate indexes are measured against."""

    def _build(self, vectors_MV: NDArray[np.float32]) -> None:
        self._index = flat_index(vectors_MV)

    def _scan(self, queries: NDArray[np.float32], k: int, permitted: Permitted | None) -> Hits:
        return scan_flat(self._index, queries, k, permitted)

    def _approximate(
        self, queries: NDArray[np.float32], k: int, permitted: Permitted | None
    ) -> Hits:
        return self._scan(queries, k, permitted)


def flat_index(vectors_MV: NDArray[np.float32]) -> faiss.IndexFlatIP:
    """All vectors one after the other."""
    index = faiss.IndexFlatIP(vectors_MV.shape[1])
    if len(vectors_MV):
        index.add(vectors_MV)
    return index


def scan_flat(
    index: faiss.Index, queries: NDArray[np.float32], k: int, permitted: Permitted | None
) -> Hits:
    """Compare the queries with all vectors of a flat index, or with the permitted ones."""
    if permitted is None:
        return index.search(queries, k)
    if permitted.count(index.ntotal) <= GATHERED_POSITIONS:
        selector = faiss.IDSelectorArray(permitted.positions(index.ntotal))
    else:
        selector = bitmap_selector(permitted, index.ntotal)
    return index.search(queries, k, params=faiss.SearchParameters(sel=selector))


def bitmap_selector(permitted: Permitted, num_items: int) -> faiss.IDSelector:
    """A selector of positions that is cheap to ask, at one bit per item."""
    return faiss.IDSelectorBitmap(np.packbits(permitted.mask(num_items), bitorder="little"))


NOTHING = np.empty(0, np.int64)


def first_kept(hits: Hits, k: int, dropped: NDArray[np.int64]) -> tuple[Hits, NDArray[np.bool_]]:
    """The first ``k`` hits of every query that are not at ``dropped``, and which queries have
    fewer; what stands in their rows means nothing."""
    scores, positions = hits
    keep = (positions >= 0) & ~is_in(positions, dropped)
    first = np.argsort(~keep, axis=1, kind="stable")[:, :k]
    kept_scores: NDArray[np.float32] = np.take_along_axis(scores, first, axis=1)
    kept_positions: NDArray[np.int64] = np.take_along_axis(positions, first, axis=1)
    return (kept_scores, kept_positions), keep.sum(axis=1) < k
