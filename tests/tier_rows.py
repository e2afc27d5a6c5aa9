"""Rows for tests of the durable tier. An event decides all of its row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from marm.memory import Namespace, UserRows

START_MS = 1_700_000_000_000


def user_rows(
    namespace: Namespace,
    user_ids: Sequence[int],
    num_rows: int = 5,
    first: int = 0,
    step: int = 7,
) -> UserRows:
    """``num_rows`` rows per user, of its events ``first..``; ``step`` -1 makes them raw."""
    rows = np.zeros(len(user_ids) * num_rows, namespace.row_dtype)
    event = np.tile(np.arange(first, first + num_rows), len(user_ids))
    user = np.repeat(np.array(user_ids, np.int64), num_rows)
    rows["timestamp_ms"] = START_MS + 1000 * event
    rows["event_key"] = (user.astype(np.uint64) << np.uint64(20)) + event.astype(np.uint64)
    rows["item_id"] = user * 10_000 + event
    rows["written_step"] = step
    if step >= 0:
        rows["written_s"] = 1_700_000_000
        shape = rows["memory"].shape
        number = (user * 31 + event * 7 + step).reshape(-1, 1, 1) + 3 * np.arange(shape[1])[:, None]
        rows["memory"] = (number + 5 * np.arange(shape[2])) % 61 / 8 - 4
    offsets = np.arange(len(user_ids) + 1, dtype=np.int64) * num_rows
    return UserRows(np.array(user_ids, np.int64), offsets, rows)


def row_owner(rows: UserRows) -> np.ndarray:
    """The user of each row, for `ShardStore.save`."""
    return np.repeat(rows.user_ids, rows.counts)


def assert_same(found: UserRows, expected: UserRows) -> None:
    """The same users with the same rows, byte for byte."""
    assert found.user_ids.tolist() == expected.user_ids.tolist()
    assert found.counts.tolist() == expected.counts.tolist()
    assert found.rows.dtype == expected.rows.dtype
    assert found.rows.tobytes() == expected.rows.tobytes()
