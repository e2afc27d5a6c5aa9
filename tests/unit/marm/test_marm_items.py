"""The item catalog: exact, and forgiving about what it does not know."""

from __future__ import annotations

import numpy as np
from sample_events import INT64

from marm.items import ItemCatalog, ItemFeatures


def items(*rows: tuple[int, int, int, int]) -> ItemFeatures:
    columns = np.array(rows, np.int64).reshape(-1, 4).T
    return ItemFeatures(*columns)


def as_rows(found: ItemFeatures) -> list[tuple[int, ...]]:
    columns = (found.item_id, found.author_id, found.tag_id, found.duration_ms)
    return [tuple(int(value) for value in row) for row in zip(*columns, strict=True)]


def test_look_up_keeps_the_order_asked_for() -> None:
    catalog = ItemCatalog(items((7, 1, 2, 3), (-4, 4, 5, 6), (INT64.max, 7, 8, 9)))
    asked = np.array([INT64.max, 7, 7, -4])
    assert as_rows(catalog.lookup(asked)) == [
        (INT64.max, 7, 8, 9),
        (7, 1, 2, 3),
        (7, 1, 2, 3),
        (-4, 4, 5, 6),
    ]


def test_unknown_items_keep_their_id_and_have_zeros() -> None:
    catalog = ItemCatalog(items((5, 1, 2, 3), (9, 4, 5, 6)))
    asked = np.array([4, 5, 6, 10, INT64.min, INT64.max])
    assert catalog.contains(asked).tolist() == [False, True, False, False, False, False]
    assert as_rows(catalog.lookup(asked)) == [
        (4, 0, 0, 0),
        (5, 1, 2, 3),
        (6, 0, 0, 0),
        (10, 0, 0, 0),
        (INT64.min, 0, 0, 0),
        (INT64.max, 0, 0, 0),
    ]


def test_the_last_entry_of_an_item_wins() -> None:
    catalog = ItemCatalog(
        items((5, 1, 1, 1), (2, 2, 2, 2), (5, 3, 3, 3), (2, 9, 9, 9), (5, 4, 4, 4))
    )
    assert len(catalog) == 2
    assert as_rows(catalog.items) == [(2, 9, 9, 9), (5, 4, 4, 4)]
    assert as_rows(catalog.lookup(np.array([5]))) == [(5, 4, 4, 4)]


def test_an_empty_catalog_knows_nothing() -> None:
    catalog = ItemCatalog(ItemFeatures.empty())
    assert len(catalog) == 0
    assert catalog.contains(np.array([1, 2])).tolist() == [False, False]
    assert as_rows(catalog.lookup(np.array([1, -2]))) == [(1, 0, 0, 0), (-2, 0, 0, 0)]


def test_asking_for_nothing() -> None:
    nothing = np.empty(0, np.int64)
    for catalog in (ItemCatalog(ItemFeatures.empty()), ItemCatalog(items((1, 2, 3, 4)))):
        assert len(catalog.lookup(nothing)) == 0
        assert catalog.contains(nothing).shape == (0,)
