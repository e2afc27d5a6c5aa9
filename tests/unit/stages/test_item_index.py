from __future__ import annotations

import numpy as np
import pytest
from serving_models import some_items

from marm.items import ItemFeatures
from stages.item_index import ExactItemIndex, build_item_index


def random_vectors(num: int, width: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num, width)).astype(np.float32)


def test_search_equals_a_full_sort():
    items, vectors = some_items(50), random_vectors(50)
    index = build_item_index("exact", items, vectors)
    queries = random_vectors(3, seed=1)
    for query, found in zip(queries, index.search(queries, 7), strict=True):
        order = np.argsort(-(vectors @ query))[:7]
        assert found.items.item_id.tolist() == items.item_id[order].tolist()
        assert found.items.author_id.tolist() == items.author_id[order].tolist()
        np.testing.assert_allclose(found.scores, (vectors @ query)[order], rtol=1e-5)


def test_more_than_there_are_gives_all_once():
    index = ExactItemIndex(some_items(5), random_vectors(5))
    (found,) = index.search(random_vectors(1), 100)
    assert sorted(found.items.item_id.tolist()) == [1, 2, 3, 4, 5]


def test_empty_index_finds_nothing():
    index = ExactItemIndex(ItemFeatures.empty(), np.empty((0, 4), np.float32))
    assert len(index) == 0
    assert [len(found) for found in index.search(random_vectors(2), 10)] == [0, 0]


@pytest.mark.parametrize("k", [0, -3])
def test_nothing_asked_nothing_found(k):
    assert (
        len(ExactItemIndex(some_items(5), random_vectors(5)).search(random_vectors(1), k)[0]) == 0
    )


def test_of_a_repeated_item_the_last_vector_counts():
    items = some_items(3).take(np.array([0, 1, 0]))
    vectors = np.array([[9, 9], [1, 0], [0, 1]], np.float32)
    (found,) = ExactItemIndex(items, vectors).search(np.array([[1, 0]], np.float32), 3)
    assert found.items.item_id.tolist() == [2, 1]
    assert found.scores.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "vectors",
    [
        random_vectors(4),
        np.full((5, 4), np.nan, np.float32),
        np.zeros(5, np.float32),
        np.zeros((5, 0), np.float32),
    ],
)
def test_vectors_that_cannot_be_searched_are_refused(vectors):
    with pytest.raises(ValueError, match="item vectors must be"):
        ExactItemIndex(some_items(5), vectors)


def test_queries_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"queries must be \[Q, 4\], got \[1, 3\]"):
        ExactItemIndex(some_items(5), random_vectors(5)).search(random_vectors(1, 3), 2)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="must be one of"):
        build_item_index("magic", some_items(5), random_vectors(5))
