"""Candidates when retrieval does not answer: similar to what the user saw last, then popular."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from marm.items import ItemFeatures
from stages.item_filters import NO_LISTS, ItemLists
from stages.item_index import Found
from stages.popular import PopularItems
from stages.request import Source, StageRequest, StageResult, empty_ids

logger = logging.getLogger("ray.serve")

SEEDS_TIMEOUT_S = 0.1
"""What looking up the user's last items may cost a request that has lost retrieval already."""

SIMILAR_SHARE = 0.5
"""Of the candidates, at most this share is similar items; popular ones fill up."""

Seeds = Callable[[StageRequest], Awaitable[NDArray[np.int64]]]
"""The items that a user saw last, newest first."""


class SimilarTo(Protocol):
    """Items like other items."""

    def top(
        self,
        k: int,
        seeds: NDArray[np.int64],
        exclude: NDArray[np.int64],
        allow: NDArray[np.int64] | None = None,
    ) -> Found:
        """The ``k`` items most like ``seeds`` that are not in ``exclude`` and, with an allow list,
        are in ``allow``."""
        ...


async def no_seeds(request: StageRequest) -> NDArray[np.int64]:
    """Nothing is known of any user."""
    return empty_ids()


class FallbackRetrieval:
    """Stands in for retrieval with what the edge itself keeps."""

    def __init__(
        self,
        popular: Callable[[], PopularItems],
        similar: Callable[[], SimilarTo | None] = lambda: None,
        seeds: Seeds = no_seeds,
        lists: Callable[[str], ItemLists] = lambda variant: NO_LISTS,
    ) -> None:
        """``lists`` are the block and allow lists of a variant's live settings: what it must not
        return is not returned in its stead either."""
        self._lists = lists
        self._popular = popular
        self._similar = similar
        self._seeds = seeds

    async def find(self, request: StageRequest, variant: str, limit: int) -> StageResult:
        """At most ``limit`` candidates, best first, under the name of the lost variant."""
        popular = self._popular()
        lists = self._all_lists(request, variant)
        alike = await self._alike(request, lists, int(limit * SIMILAR_SHARE))
        if not len(alike):
            return self.popular(request, variant, limit)
        hidden = np.union1d(lists.blocked, alike.items.item_id)
        found = interleaved(alike, popular.top(limit - len(alike), hidden, lists.allowed))
        return as_result(found, variant, "similar", len(popular))

    def popular(self, request: StageRequest, variant: str, limit: int) -> StageResult:
        """The ``limit`` most popular items that may be returned."""
        popular = self._popular()
        lists = self._all_lists(request, variant)
        found = popular.top(limit, lists.blocked, lists.allowed)
        return as_result(found, variant, "popular", len(popular))

    def _all_lists(self, request: StageRequest, variant: str) -> ItemLists:
        of_request = ItemLists.of([request.exclude_item_ids], request.allow_item_ids)
        return self._lists(variant).joined(of_request)

    async def _alike(self, request: StageRequest, lists: ItemLists, limit: int) -> Found:
        nothing = Found.nothing()
        similar = self._similar()
        if similar is None or limit < 1:
            return nothing
        try:
            async with asyncio.timeout(SEEDS_TIMEOUT_S):
                seeds = await self._seeds(request)
            if not len(seeds):
                return nothing
            return similar.top(limit, seeds, np.union1d(lists.blocked, seeds), lists.allowed)
        except Exception as error:
            # Popular items alone are an answer too.
            logger.warning("similar items were not found: %s: %s", type(error).__name__, error)
            return nothing


def as_result(found: Found, variant: str, source: Source, num_in: int) -> StageResult:
    """The answer of retrieval with ``found``."""
    return StageResult(
        stage="retrieval",
        variant=variant,
        candidates=found.items,
        scores=found.scores,
        source=source,
        num_in=num_in,
    )


def interleaved(first: Found, second: Found) -> Found:
    """In turns from both, the rest of the longer one last.

    The scores of the two are not on one scale, so each item is given ``1 / (1 + its place)``.
    """
    order = np.argsort(np.concatenate([2 * np.arange(len(first)), 2 * np.arange(len(second)) + 1]))
    pairs = zip(columns(first.items), columns(second.items), strict=True)
    items = ItemFeatures(*(np.concatenate(pair)[order] for pair in pairs))
    return Found(items, (1 / np.arange(1, len(order) + 1)).astype(np.float32))


def columns(items: ItemFeatures) -> tuple[NDArray[np.int64], ...]:
    """The columns of ``items`` in the order of its fields."""
    return items.item_id, items.author_id, items.tag_id, items.duration_ms
