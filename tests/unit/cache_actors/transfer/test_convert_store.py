"""Conversion from namespace to namespace of one store on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache_actors.store.row_formats import as_read
from cache_actors.store.shard_store import ShardStore
from cache_actors.transfer.convert import convert_buckets, convert_namespace
from marm.memory import Namespace

WIDE = Namespace(depth=2, dim=5, dtype="float32")
USERS = np.arange(300)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_store_converts_into_itself(tmp_path: Path, dtype: str) -> None:
    rows = np.zeros(len(USERS) * 4, WIDE.row_dtype)
    rows["timestamp_ms"] = np.tile(np.arange(4), len(USERS)) + 5
    rows["event_key"] = np.arange(len(rows))
    rows["memory"] = np.random.default_rng(0).normal(size=rows["memory"].shape)
    rows["written_step"] = 3
    narrow = replace(WIDE, dtype=dtype)
    store = ShardStore(tmp_path / "shard")
    source, target = store.open(WIDE), store.open(narrow)
    source.save(USERS.repeat(4), rows).wait()
    for _, _done in zip(range(100), convert_buckets(source, target), strict=False):
        pass
    store.close()

    store = ShardStore(tmp_path / "shard")
    source, target = store.open(WIDE), store.open(narrow)
    assert 0 < convert_namespace(source, target).rows_written < len(rows)
    assert convert_namespace(source, target).rows_written == 0
    expected = as_read(narrow, rows.astype(narrow.row_dtype))
    assert target.fetch(USERS, 10).rows.tobytes() == expected.tobytes()
    first = target.fetch(USERS, 10, layers=1).rows
    np.testing.assert_array_equal(first["memory"], expected["memory"][:, :1])
    assert source.fetch(USERS, 10).rows.tobytes() == rows.tobytes()
    store.close()
