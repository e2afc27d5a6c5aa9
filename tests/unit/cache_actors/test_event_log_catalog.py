from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache_actors.event_log.catalog import append_items, catalog_version, read_catalog
from marm.items import ItemFeatures


def items(ids: list[int], author: int) -> ItemFeatures:
    count = len(ids)
    return ItemFeatures(
        np.array(ids, np.int64),
        np.full(count, author),
        np.arange(count),
        np.full(count, 1_000),
    )


def test_the_last_write_of_an_item_wins(tmp_path: Path) -> None:
    assert catalog_version(tmp_path) == 0
    assert len(read_catalog(tmp_path)) == 0
    assert append_items(tmp_path, items([1, 2, 3], author=7)) == 1
    assert append_items(tmp_path, items([2, 9], author=8)) == 2
    assert catalog_version(tmp_path) == 2
    catalog = read_catalog(tmp_path)
    assert catalog.items.item_id.tolist() == [1, 2, 3, 9]
    assert catalog.items.author_id.tolist() == [7, 8, 7, 8]


def test_no_items_make_no_part(tmp_path: Path) -> None:
    assert append_items(tmp_path, ItemFeatures.empty()) == 0
    assert not (tmp_path / "items").exists()


def test_columns_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    one = np.ones(1, np.int64)
    with pytest.raises(ValueError, match="'tag_id' must be 1 integers"):
        append_items(tmp_path, ItemFeatures(one, one, np.ones(2, np.int64), one))
    with pytest.raises(ValueError, match="'duration_ms' must be 1 integers"):
        append_items(tmp_path, ItemFeatures(one, one, one, np.array([1.5])))
    assert catalog_version(tmp_path) == 0


def test_damaged_parts_are_named_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(1, 5):
        append_items(tmp_path, items([number], author=number))
    parts = tmp_path / "items"
    torn = parts / "000000000002.parquet"
    torn.write_bytes(torn.read_bytes()[:-30])
    pq.write_table(pa.table({"item": [1]}), parts / "000000000003.parquet")
    with caplog.at_level(logging.WARNING):
        assert read_catalog(tmp_path).items.item_id.tolist() == [1, 4]
    assert "000000000002.parquet" in caplog.text
    assert "000000000003.parquet: expected columns" in caplog.text
    assert append_items(tmp_path, items([5], author=5)) == 5


def test_threads_append_without_loss(tmp_path: Path) -> None:
    def append(writer: int) -> None:
        for turn in range(5):
            append_items(tmp_path, items([100 * writer + turn], author=1))

    writers = [threading.Thread(target=append, args=(writer,)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert catalog_version(tmp_path) == 20
    assert len(read_catalog(tmp_path)) == 20
