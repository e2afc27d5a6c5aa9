"""Items like those a user saw last: what is left of retrieval when its deployment is gone.

It needs no model: the item vectors of a published version are compared with each other. The small
form returns only popular items and knows the vectors of a bounded number of items to start from, so
that every replica of the edge can hold one.

Shapes: M items that may be returned, S items to start from, V vector width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marm.items import ItemFeatures
from stages.item_filters import ItemFilter, ItemLists, ItemPositions
from stages.item_index import Found, check_vectors, last_occurrence
from stages.popular import PopularItems

MAX_SEEDS = 20
"""Only the newest so many items that a user saw are compared."""

SMALL_ITEMS = 12_000
SMALL_SEEDS = 100_000
"""Bounds of the small form: items that it may return, and items that it knows how to start from.
With vectors of 32 floats it takes 10 MB."""


@dataclass(frozen=True)
class SimilarItems:
    """Neighbours of items by the inner product of their vectors.

    Attributes:
        items: the items that may be returned, each once.
        vectors_MV: their vectors.
        positions: where ``items`` stand, by id.
        seed_vectors_SV: vectors of the items that can be started from, in half precision.
        seed_positions: where these stand, by id.
    """

    items: ItemFeatures
    vectors_MV: NDArray[np.float32]
    positions: ItemPositions
    seed_vectors_SV: NDArray[np.float16]
    seed_positions: ItemPositions

    @staticmethod
    def of(items: ItemFeatures, vectors_MV: NDArray[np.float32]) -> SimilarItems:
        """Neighbours among all ``items``; of an id that occurs twice the last vector counts.

        Raises:
            ValueError: when the vectors are not finite or not one per item.
        """
        check_vectors(items, vectors_MV)
        every = last_occurrence(items.item_id)
        return SimilarItems._between(items, vectors_MV, every, every)

    @staticmethod
    def small(
        items: ItemFeatures,
        vectors_MV: NDArray[np.float32],
        popularity: NDArray[np.float32],
        num_items: int = SMALL_ITEMS,
        num_seeds: int = SMALL_SEEDS,
    ) -> SimilarItems:
        """Neighbours among the ``num_items`` most popular items, starting from any of the
        ``num_seeds`` most popular.

        Raises:
            ValueError: when vectors or popularity are not finite or not one per item.
        """
        check_vectors(items, vectors_MV)
        ranked = PopularItems.ranked(items, popularity)
        kept = last_occurrence(items.item_id)
        by_id = ItemPositions(items.item_id[kept])
        near = kept[by_id.find(ranked.head(num_items).items.item_id)]
        known = kept[by_id.find(ranked.head(num_seeds).items.item_id)]
        return SimilarItems._between(items, vectors_MV, near, known)

    @staticmethod
    def _between(
        items: ItemFeatures,
        vectors_MV: NDArray[np.float32],
        near: NDArray[np.int64],
        known: NDArray[np.int64],
    ) -> SimilarItems:
        return SimilarItems(
            items=items.take(near),
            vectors_MV=vectors_MV[near],
            positions=ItemPositions(items.item_id[near]),
            seed_vectors_SV=vectors_MV[known].astype(np.float16),
            seed_positions=ItemPositions(items.item_id[known]),
        )

    @staticmethod
    def empty() -> SimilarItems:
        """No items."""
        return SimilarItems.of(ItemFeatures.empty(), np.empty((0, 1), np.float32))

    def __len__(self) -> int:
        return len(self.items)

    def top(
        self,
        k: int,
        seeds: NDArray[np.int64],
        exclude: NDArray[np.int64],
        allow: NDArray[np.int64] | None = None,
    ) -> Found:
        """The ``k`` items most like one of ``seeds`` that are not in ``exclude`` and, with an allow
        list, are in ``allow``; see `permitted`."""
        return self.permitted(k, seeds, ItemFilter(request=ItemLists.of([exclude], allow)))

    def permitted(self, k: int, seeds: NDArray[np.int64], item_filter: ItemFilter) -> Found:
        """The ``k`` items most like one of ``seeds``, best first, each once with its best score.

        Args:
            k: at most so many items.
            seeds: item ids, newest first; the first `MAX_SEEDS` that are known count. They are not
                returned themselves. With none that is known nothing is found.
            item_filter: what may be returned.
        """
        known = self._known(np.asarray(seeds, np.int64))
        if not len(known) or k < 1:
            return Found.nothing()
        allowed = self.positions.permitted(item_filter).positions(len(self))
        own = self.positions.find(seeds)
        allowed = allowed[~np.isin(allowed, own)]
        queries = self.seed_vectors_SV[known].astype(np.float32)
        scores = (self.vectors_MV @ queries.T).max(axis=1)[allowed]
        if k < len(scores):
            head = np.argpartition(-scores, k)[:k]
            allowed, scores = allowed[head], scores[head]
        order = np.argsort(-scores, kind="stable")
        return Found(self.items.take(allowed[order]), scores[order])

    def _known(self, seeds: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the newest seeds whose vectors are known."""
        rows = [self.seed_positions.find(seeds[i : i + 1]) for i in range(len(seeds))]
        return np.concatenate([np.empty(0, np.int64), *rows])[:MAX_SEEDS]
