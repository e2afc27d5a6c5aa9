from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from marm.events import TASKS
from train.data.staged_rows import STAGED_SCHEMA, clean, split_tallies

T0_MS = 1_600_000_000_000


def test_every_row_is_kept_or_dropped_for_its_first_reason() -> None:
    table = pa.table(
        {
            "user_id": [1, None, -3, 4, 5, 6, 7],
            "item_id": [1, None, 3, None, 5, 6, -7],
            "timestamp": [T0_MS, T0_MS, T0_MS, T0_MS, None, T0_MS, T0_MS],
            "long_view": [1.0, 1.0, 1.0, 1.0, 1.0, None, 1.0],
        }
    )
    rows, tallies = split_tallies(clean(table, "ms", first_ordinal=100, malformed_rows=2))
    assert rows.schema == STAGED_SCHEMA
    assert rows.column("user_id").to_pylist() == [1]
    assert rows.column("ordinal").to_pylist() == [100]
    assert tallies == {
        "rows": 9,
        "dropped:malformed_row": 2,
        "dropped:null_user_id": 1,
        "dropped:negative_user_id": 1,
        "dropped:null_item_id": 1,
        "dropped:null_timestamp": 1,
        "dropped:no_label": 1,
        "dropped:negative_item_id": 1,
    }


def test_labels_out_of_range_become_unknown_and_are_counted() -> None:
    table = pa.table(
        {
            "user_id": [1, 2, 3],
            "item_id": [1, 2, 3],
            "timestamp": [T0_MS] * 3,
            "click": [1.0, 5.0, 0.0],
            "watch_time_ms": [1500.0, -1.0, None],
            "duration_ms": [10.4, -5.0, None],
            "author_id": [-1, 2, None],
            "tag_id": ["x", "", None],
            "context_id": [1 << 40, 3, 0],
        }
    )
    rows, tallies = split_tallies(clean(table, "ms", 0))
    # The second row's labels were both unusable.
    assert rows.column("user_id").to_pylist() == [1, 3]
    assert rows.column("watch_time").to_pylist()[0] == 1.5
    assert np.isnan(rows.column("watch_time").to_pylist()[1])
    assert rows.column("click").to_pylist() == [1.0, 0.0]
    assert rows.column("duration_ms").to_pylist() == [10, 0]
    assert rows.column("author_id").to_pylist() == [0, 0]
    assert rows.column("context_id").to_pylist() == [0, 0]
    assert rows.column("tag_id").to_pylist()[1] == 0
    assert tallies["dropped:no_label"] == 1
    assert tallies["repaired:click_neither_0_nor_1_made_unknown"] == 1
    assert tallies["repaired:watch_time_out_of_range_made_unknown"] == 1
    assert tallies["repaired:author_id_out_of_range_made_unknown"] == 1
    assert tallies["repaired:context_id_out_of_range_made_unknown"] == 1


@pytest.mark.parametrize("ids", [[7, None, 9], ["a", None, "b"]])
def test_own_event_ids_become_keys(ids: list) -> None:
    table = pa.table(
        {
            "user_id": [1, 2, 3],
            "item_id": [1, 2, 3],
            "timestamp": [T0_MS] * 3,
            "like": [1, 0, 1],
            "event_id": ids,
        }
    )
    keys = split_tallies(clean(table, "ms", 0))[0].column("event_key").to_pylist()
    assert keys[1] == 0  # to be derived
    assert keys[0] != keys[2]
    assert 0 not in (keys[0], keys[2])


def test_a_table_of_no_rows_still_tells_its_count() -> None:
    empty = pa.table({name: pa.array([], pa.int64()) for name in ("user_id", "item_id")})
    empty = empty.append_column("timestamp", pa.array([], pa.int64()))
    empty = empty.append_column(TASKS[0], pa.array([], pa.float32()))
    rows, tallies = split_tallies(clean(empty, "ms", 0))
    assert rows.num_rows == 0
    assert tallies == {"rows": 0}
