from __future__ import annotations

import numpy as np
import pytest
from serving_models import some_items

from stages.item_filters import ItemFilter, ItemLists
from stages.similar_items import MAX_SEEDS, SimilarItems

NUM_ITEMS = 300
NOBODY = np.empty(0, np.int64)


@pytest.fixture(scope="module")
def vectors():
    drawn = np.random.default_rng(0).normal(size=(NUM_ITEMS, 6)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def popularity():
    return np.linspace(1, 0, NUM_ITEMS).astype(np.float32)  # falls with the id


@pytest.fixture(scope="module", params=["whole", "small"])
def similar(request, vectors, popularity):
    items = some_items(NUM_ITEMS)
    if request.param == "small":
        return SimilarItems.small(items, vectors, popularity)
    return SimilarItems.of(items, vectors)


def expected(vectors, seeds, hidden, k) -> list[int]:
    scores = (vectors @ vectors[np.array(seeds) - 1].T).max(axis=1)
    ids = np.arange(1, NUM_ITEMS + 1)
    order = [int(i) for i in ids[np.argsort(-scores, kind="stable")] if i not in hidden]
    return order[:k]


def test_neighbours_of_the_nearest_seed(similar, vectors):
    found = similar.top(40, np.array([7, 200, 30]), np.array([5, 6, 9999]))
    wanted = expected(vectors, [7, 200, 30], {7, 200, 30, 5, 6}, 40)
    # Seeds are kept in half precision, so neighbours that are as near may change places.
    assert len(set(found.items.item_id.tolist()) & set(wanted)) >= 39
    assert found.items.item_id[0] == wanted[0]
    assert np.all(np.diff(found.scores) <= 0)
    assert found.items.author_id.tolist() == (found.items.item_id % 7 + 1).tolist()


def test_an_allow_list_is_exclusive(similar):
    found = similar.top(40, np.array([7]), np.array([3]), np.array([7, 3, 4, 250, 10**9]))
    assert sorted(found.items.item_id.tolist()) == [4, 250]


def test_unknown_seeds_are_ignored_and_none_finds_nothing(similar):
    with_unknown = similar.top(5, np.array([10**9, 7, -5]), NOBODY)
    assert (
        with_unknown.items.item_id.tolist()
        == similar.top(5, np.array([7]), NOBODY).items.item_id.tolist()
    )
    assert len(similar.top(5, np.array([10**9]), NOBODY)) == 0
    assert len(similar.top(5, NOBODY, NOBODY)) == 0
    assert len(similar.top(0, np.array([7]), NOBODY)) == 0


def test_the_newest_seeds_count(similar):
    seeds = np.arange(1, MAX_SEEDS + 1)
    few = similar.top(20, seeds, np.arange(100, 200))
    more = similar.top(20, np.append(seeds, [150, 160]), np.arange(100, 200))
    assert few.items.item_id.tolist() == more.items.item_id.tolist()


def test_the_small_form_is_bounded_and_keeps_popular_items(vectors, popularity):
    small = SimilarItems.small(some_items(NUM_ITEMS), vectors, popularity, 50, 100)
    assert len(small) == 50
    assert small.seed_vectors_SV.nbytes == 100 * 6 * 2
    found = small.top(50, np.array([90]), NOBODY)  # a seed that is not returned itself
    assert sorted(found.items.item_id.tolist()) == list(range(1, 51))
    assert len(small.top(50, np.array([101]), NOBODY)) == 0


def test_of_a_repeated_item_the_last_vector_counts():
    items = some_items(3).take(np.array([0, 1, 0, 2]))
    vectors = np.array([[9, 9], [1, 0], [0, 1], [0.1, 0.9]], np.float32)
    popularity = np.array([1, 2, 3, 4], np.float32)
    for similar in (
        SimilarItems.small(items, vectors, popularity),
        SimilarItems.of(items, vectors),
    ):
        found = similar.top(5, np.array([3]), NOBODY)
        assert found.items.item_id.tolist() == [1, 2]
        np.testing.assert_allclose(found.scores, [0.9, 0.1], atol=1e-3)


def test_standing_lists_hold_too(similar):
    standing = ItemLists.of([[4]], [3, 4, 5, 6])
    found = similar.permitted(9, np.array([7]), ItemFilter(standing, ItemLists.of([[5]])))
    assert sorted(found.items.item_id.tolist()) == [3, 6]


def test_no_items():
    assert len(SimilarItems.empty()) == 0
    assert len(SimilarItems.empty().top(5, np.array([1]), NOBODY)) == 0
    nothing = some_items(0)
    small = SimilarItems.small(nothing, np.empty((0, 4), np.float32), np.empty(0, np.float32))
    assert len(small.top(5, np.array([1]), NOBODY)) == 0


def test_broken_vectors_are_refused(popularity):
    broken = np.full((NUM_ITEMS, 4), np.nan, np.float32)
    with pytest.raises(ValueError, match="item vectors must be finite"):
        SimilarItems.small(some_items(NUM_ITEMS), broken, popularity)
