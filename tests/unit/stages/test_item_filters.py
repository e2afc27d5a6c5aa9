from __future__ import annotations

import numpy as np
import pytest

from stages.item_filters import EVERY_ITEM, ItemFilter, ItemLists, ItemPositions, is_in, without

TABLE = ItemPositions(np.array([50, 10, 40, 20, 30]))


def permitted(standing: ItemLists, request: ItemLists) -> list[int]:
    found = TABLE.permitted(ItemFilter(standing, request))
    positions = found.positions(len(TABLE)).tolist()
    assert len(positions) == found.count(len(TABLE))
    return positions


def test_lists_ascend_and_hold_each_id_once():
    lists = ItemLists.of([[5, 1, 5], np.array([], np.int64), (3,)], [9, 2, 9])
    assert lists.blocked.tolist() == [1, 3, 5]
    assert lists.allowed is not None
    assert lists.allowed.tolist() == [2, 9]
    assert ItemLists.of().blocked.dtype == np.int64


@pytest.mark.parametrize(
    ("standing", "request_lists", "expected"),
    [
        (ItemLists.of(), ItemLists.of(), [0, 1, 2, 3, 4]),
        (ItemLists.of([[10]]), ItemLists.of([[50, 99]]), [2, 3, 4]),
        (ItemLists.of([], [10, 20, 99]), ItemLists.of(), [1, 3]),
        (ItemLists.of([], [10, 20, 30]), ItemLists.of([[20]]), [1, 4]),
        (ItemLists.of([], [10, 20, 30]), ItemLists.of([[20]], [20, 30, 40]), [4]),
        (ItemLists.of([[30]]), ItemLists.of([], [20, 30]), [3]),
        (ItemLists.of(), ItemLists.of([], [99]), []),
        (ItemLists.of([[10, 20, 30, 40, 50]]), ItemLists.of(), []),
        (ItemLists.of([], []), ItemLists.of(), []),
    ],
)
def test_what_both_kinds_of_lists_let_through(standing, request_lists, expected):
    assert permitted(standing, request_lists) == expected


def test_standing_lists_are_translated_once_and_again_when_they_change():
    table = ItemPositions(np.arange(10))
    first, second = ItemLists.of([[1]]), ItemLists.of([[2]])
    for lists, blocked in [(first, [1]), (first, [1]), (second, [2]), (first, [1])]:
        assert table.permitted(ItemFilter(standing=lists)).blocked.tolist() == blocked
    kept = table._standing
    table.permitted(ItemFilter(standing=first, request=second))
    assert table._standing is kept


def test_an_empty_table():
    table = ItemPositions(np.empty(0, np.int64))
    assert table.find(np.array([1])).tolist() == []
    assert table.permitted(EVERY_ITEM).count(0) == 0


def test_membership_in_ascending_values():
    assert is_in(np.array([[3, -1], [9, 4]]), np.array([3, 4])).tolist() == [
        [True, False],
        [False, True],
    ]
    assert without(np.array([5, 1, 3]), np.array([1, 2])).tolist() == [5, 3]
    assert is_in(np.array([1]), np.empty(0, np.int64)).tolist() == [False]


@pytest.mark.parametrize("one", [ItemLists.of(), ItemLists.of([[10]], [10, 20, 50])])
@pytest.mark.parametrize("other", [ItemLists.of([[50]]), ItemLists.of([], [20, 40])])
def test_joined_lists_let_through_what_both_do(one, other):
    assert permitted(one.joined(other), ItemLists.of()) == permitted(one, other)
    assert permitted(ItemLists.of(), other.joined(one)) == permitted(one, other)
