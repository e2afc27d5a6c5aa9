"""The approximate kinds of item index: inverted lists (IVF) and a graph (HNSW).

Both hold the vectors as they are, so that scores are exact and so is a scan of all items. What
they trade for speed is how many items a search looks at: its effort.
"""

from __future__ import annotations

from abc import abstractmethod
from math import ceil, isqrt

import faiss
import numpy as np
from numpy.typing import NDArray

from marm.items import ItemFeatures
from stages.index_args import HnswIndexArgs, IvfIndexArgs
from stages.item_filters import Permitted
from stages.item_index_faiss import (
    GATHERED_POSITIONS,
    FaissItemIndex,
    Hits,
    bitmap_selector,
    flat_index,
    scan_flat,
)

MIN_ITEMS_PER_LIST = 39
"""Fewer make poor clusters; faiss asks for as many."""

TRAINING_ITEMS_PER_LIST = 64
"""Items that clusters are made from. More barely change them and take the time of a refresh."""

PROBED_SURPLUS = 2
"""Probed lists hold at least so many times the items that are wanted."""


class ApproximateItemIndex(FaissItemIndex):
    """An index whose ``effort`` says how many of its parts a search looks at."""

    effort: int = 1
    """Set while the index is made, before anybody searches."""

    @property
    @abstractmethod
    def max_effort(self) -> int:
        """An effort above this changes nothing."""

    @abstractmethod
    def least_effort(self, k: int) -> int:
        """What a search for ``k`` items takes at the least."""

    def _looked_at(self, k: int, permitted: Permitted | None) -> int:
        """Items that are to be looked at so that ``k`` of them are permitted, on average."""
        share = 1.0 if permitted is None else permitted.count(len(self)) / len(self)
        return ceil(k / share)


class IvfItemIndex(ApproximateItemIndex):
    """Items in clusters; effort is the number of clusters that a search looks at (nprobe)."""

    def __init__(
        self,
        items: ItemFeatures,
        vectors_MV: NDArray[np.float32],
        args: IvfIndexArgs,
        num_threads: int = 1,
    ) -> None:
        """See `FaissItemIndex`; with few items there are fewer clusters than configured."""
        self._nlist = args.nlist
        super().__init__(items, vectors_MV, num_threads)

    @property
    def nlist(self) -> int:
        """Clusters that there are."""
        return int(self._index.nlist)

    @property
    def max_effort(self) -> int:
        """See `ApproximateItemIndex.max_effort`."""
        return self.nlist

    def least_effort(self, k: int) -> int:
        """See `ApproximateItemIndex.least_effort`."""
        return ceil(PROBED_SURPLUS * k * self.nlist / max(len(self), 1))

    def _build(self, vectors_MV: NDArray[np.float32]) -> None:
        num_items = len(vectors_MV)
        wanted = self._nlist or isqrt(num_items)
        nlist = max(1, min(wanted, num_items // MIN_ITEMS_PER_LIST))
        self._index = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(self.width), self.width, nlist, faiss.METRIC_INNER_PRODUCT
        )
        self._index.cp.spherical = True
        self._index.cp.min_points_per_centroid = 1
        self._index.cp.max_points_per_centroid = TRAINING_ITEMS_PER_LIST
        if self._num_threads > 1:  # also a single query shall use them
            self._index.parallel_mode = 1
        if num_items:
            self._index.train(vectors_MV)
            self._index.add(vectors_MV)
            self._index.make_direct_map()

    def _approximate(
        self, queries: NDArray[np.float32], k: int, permitted: Permitted | None
    ) -> Hits:
        effort = max(self.effort, self.least_effort(self._looked_at(k, permitted)))
        return self._probe(queries, k, permitted, min(effort, self.nlist))

    def _scan(self, queries: NDArray[np.float32], k: int, permitted: Permitted | None) -> Hits:
        if permitted is not None and permitted.count(len(self)) <= GATHERED_POSITIONS:
            only = permitted.positions(len(self))
            # A temporary flat index: picking few vectors is quicker than walking all clusters.
            scores, at = flat_index(self._index.reconstruct_batch(only)).search(queries, k)
            return scores, only[at]
        return self._probe(queries, k, permitted, self.nlist)

    def _probe(
        self, queries: NDArray[np.float32], k: int, permitted: Permitted | None, nprobe: int
    ) -> Hits:
        selector = None if permitted is None else bitmap_selector(permitted, len(self))
        parameters = faiss.SearchParametersIVF(nprobe=nprobe, sel=selector)
        return self._index.search(queries, k, params=parameters)


class HnswItemIndex(ApproximateItemIndex):
    """A graph of near items; effort is the number of candidates a search keeps (ef_search)."""

    def __init__(
        self,
        items: ItemFeatures,
        vectors_MV: NDArray[np.float32],
        args: HnswIndexArgs,
        num_threads: int = 1,
    ) -> None:
        """See `FaissItemIndex`."""
        self._args = args
        super().__init__(items, vectors_MV, num_threads)

    @property
    def max_effort(self) -> int:
        """See `ApproximateItemIndex.max_effort`."""
        return max(1, len(self))

    def least_effort(self, k: int) -> int:
        """See `ApproximateItemIndex.least_effort`."""
        return k

    def _build(self, vectors_MV: NDArray[np.float32]) -> None:
        self._index = faiss.IndexHNSWFlat(self.width, self._args.M, faiss.METRIC_INNER_PRODUCT)
        self._index.hnsw.efConstruction = self._args.ef_construction
        if len(vectors_MV):
            self._index.add(vectors_MV)

    def _approximate(
        self, queries: NDArray[np.float32], k: int, permitted: Permitted | None
    ) -> Hits:
        selector = None if permitted is None else bitmap_selector(permitted, len(self))
        effort = max(self.effort, self.least_effort(self._looked_at(k, permitted)))
        effort = min(effort, self.max_effort)
        parameters = faiss.SearchParametersHNSW(efSearch=effort, sel=selector)
        return self._index.search(queries, k, params=parameters)

    def _scan(self, queries: NDArray[np.float32], k: int, permitted: Permitted | None) -> Hits:
        return scan_flat(self._index.storage, queries, k, permitted)
