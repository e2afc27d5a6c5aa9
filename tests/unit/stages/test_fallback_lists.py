"""What a retrieval variant must not return is not returned in its stead either."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
from serving_models import some_items

from stages.fallback import FallbackRetrieval
from stages.item_filters import NO_LISTS, ItemLists
from stages.popular import PopularItems
from stages.request import StageRequest
from stages.similar_items import SimilarItems

ITEMS = some_items(60)
POPULARITY = np.linspace(1, 0, 60).astype(np.float32)
LISTS = {"a": ItemLists.of([range(1, 20)], range(1, 41)), "b": NO_LISTS}


async def last_seen(request: StageRequest) -> np.ndarray:
    return np.array([25, 26])


@pytest.fixture
def fallback():
    vectors = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    similar = SimilarItems.small(ITEMS, vectors, POPULARITY)
    popular = PopularItems.ranked(ITEMS, POPULARITY)
    return FallbackRetrieval(
        lambda: popular, lambda: similar, last_seen, lambda variant: LISTS[variant]
    )


def make_request(**changes) -> StageRequest:
    deadline_ms = int(time.time() * 1000) + 60_000
    return StageRequest("r", 1, 1_000_000, None, 0, 20, deadline_ms, **changes)


def test_lists_of_the_variant_and_of_the_request(fallback):
    request = make_request(
        exclude_item_ids=np.array([30]), allow_item_ids=np.array([5, 22, 23, 25, 30, 31, 55])
    )
    found = asyncio.run(fallback.find(request, "a", 20))
    assert found.source == "similar"
    ids = found.candidates.item_id.tolist()
    assert sorted(set(ids) | {25}) == [22, 23, 25, 31]  # 25 was seen: popular, but not similar
    assert len(ids) == len(set(ids))
    popular = fallback.popular(request, "a", 20).candidates.item_id.tolist()
    assert popular == [22, 23, 25, 31]
    other = fallback.popular(request, "b", 20).candidates.item_id.tolist()
    assert other == [5, 22, 23, 25, 31, 55]


def test_without_lists_of_the_request_those_of_the_variant_hold(fallback):
    found = asyncio.run(fallback.find(make_request(), "a", 60))
    assert sorted(found.candidates.item_id.tolist()) == list(range(20, 41))
    assert len(asyncio.run(fallback.find(make_request(), "b", 60))) == 60
