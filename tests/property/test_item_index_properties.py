"""Whatever the lists and the kind of index: the best of what is permitted, and all of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marm.items import ItemFeatures
from stages.index_args import HnswIndexArgs, IvfIndexArgs
from stages.index_build import build_item_index
from stages.item_filters import ItemFilter, ItemLists
from stages.item_index import best_of
from stages.popular import PopularItems

NUM_ITEMS, NUM_IDS = 700, 900
SOME_IDS = st.lists(st.integers(-5, NUM_IDS), max_size=120)
FEW_OR_MANY = SOME_IDS | st.sampled_from([list(range(0, NUM_IDS, 2)), list(range(40, NUM_IDS))])
LISTS = st.builds(ItemLists.of, st.lists(FEW_OR_MANY, max_size=2), st.none() | FEW_OR_MANY)
FILTERS = st.builds(ItemFilter, LISTS, LISTS)

RNG = np.random.default_rng(0)
ITEM_IDS = RNG.permutation(NUM_IDS)[:NUM_ITEMS].astype(np.int64)
ITEMS = ItemFeatures(ITEM_IDS, ITEM_IDS % 7, ITEM_IDS % 5, ITEM_IDS * 10)
VECTORS = RNG.normal(size=(NUM_ITEMS, 6)).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)
INDEXES = {
    kind: build_item_index(args, ITEMS, VECTORS)
    for kind, args in {
        "exact": "exact",
        "ivf": IvfIndexArgs(nlist=16, nprobe=1, min_recall=0.01),
        "hnsw": HnswIndexArgs(M=8, ef_search=4, min_recall=0.01),
    }.items()
}


def permitted(item_filter: ItemFilter) -> np.ndarray:
    mask = np.ones(NUM_ITEMS, np.bool_)
    for lists in item_filter.all_lists:
        mask &= ~np.isin(ITEM_IDS, lists.blocked)
        mask &= True if lists.allowed is None else np.isin(ITEM_IDS, lists.allowed)
    return mask


@pytest.mark.parametrize("kind", sorted(INDEXES))
@given(item_filter=FILTERS, k=st.integers(0, NUM_ITEMS + 10), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_search_returns_as_many_as_are_permitted(kind, item_filter, k, seed):
    queries = np.random.default_rng(seed).normal(size=(2, 6)).astype(np.float32)
    mask = permitted(item_filter)
    results = INDEXES[kind].search(queries, k, item_filter)
    for query, found in zip(queries, results, strict=True):
        ids = found.items.item_id
        assert len(set(ids.tolist())) == len(ids) == min(k, int(mask.sum()))
        assert np.isin(ids, ITEM_IDS[mask]).all()
        assert (np.diff(found.scores) <= 0).all()
        assert (found.items.duration_ms == 10 * ids).all()
        scores = dict(zip(ITEM_IDS.tolist(), (VECTORS @ query).tolist(), strict=True))
        np.testing.assert_allclose(found.scores, [scores[i] for i in ids.tolist()], atol=1e-5)
        if kind == "exact":
            best = np.sort((VECTORS @ query)[mask])[::-1][: len(ids)]
            np.testing.assert_allclose(found.scores, best, atol=1e-5)


@given(item_filter=FILTERS, k=st.integers(0, 50), num_queries=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_merged_results_are_the_best_by_best_score(item_filter, k, num_queries):
    queries = np.random.default_rng(k).normal(size=(num_queries, 6)).astype(np.float32)
    mask = permitted(item_filter)
    merged = best_of(INDEXES["exact"].search(queries, k, item_filter), k)
    best = np.sort((VECTORS[mask] @ queries.T).max(axis=1))[::-1][:k]
    np.testing.assert_allclose(merged.scores, best, atol=1e-5)
    assert len(set(merged.items.item_id.tolist())) == len(merged)


@given(item_filter=FILTERS, k=st.integers(-1, NUM_ITEMS + 10))
@settings(max_examples=60, deadline=None)
def test_popular_items_under_any_filter(item_filter, k):
    popular = PopularItems.ranked(ITEMS, np.arange(NUM_ITEMS, dtype=np.float32))
    found = popular.permitted(k, item_filter)
    expected = ITEM_IDS[::-1][permitted(item_filter)[::-1]][: max(k, 0)]
    assert found.items.item_id.tolist() == expected.tolist()
