from __future__ import annotations

import numpy as np
import pytest
from serving_models import some_items

from stages.popular import PopularItems


def test_most_popular_first_and_excluded_ones_replaced():
    popular = PopularItems.ranked(some_items(5), np.array([1, 5, 3, 5, 2], np.float32))
    assert popular.items.item_id.tolist() == [2, 4, 3, 5, 1]  # ties: the smaller id first
    found = popular.top(3, np.array([4, 77]))
    assert found.items.item_id.tolist() == [2, 3, 5]
    assert found.scores.tolist() == [5, 3, 2]


def test_head_and_bounds():
    popular = PopularItems.ranked(some_items(5), np.arange(5, dtype=np.float32))
    assert popular.head(2).items.item_id.tolist() == [5, 4]
    assert len(popular.top(99, np.empty(0, np.int64))) == 5
    assert len(popular.top(-1, np.array([1]))) == 0
    assert len(PopularItems.empty().top(3, np.array([1]))) == 0


def test_an_item_is_listed_once():
    items = some_items(2).take(np.array([0, 1, 0]))
    popular = PopularItems.ranked(items, np.array([9, 5, 1], np.float32))
    assert popular.items.item_id.tolist() == [2, 1]


@pytest.mark.parametrize("popularity", [[1.0, np.nan], [1.0]])
def test_broken_popularity_is_refused(popularity):
    with pytest.raises(ValueError, match="popularity must"):
        PopularItems.ranked(some_items(2), np.array(popularity, np.float32))
