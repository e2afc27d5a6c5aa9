"""Rows of a fixed log of events, for tests of pools."""

from __future__ import annotations

import numpy as np

from marm.memory import RAW_STEP, Namespace

EVENT_NAMESPACE = Namespace(dim=8)


def event_rows(
    num_users: int, count: int, start: int = 0, step: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Rows ``start..start + count``, and whose they are; the same event is always the same."""
    index = np.arange(start, start + count)
    rows = np.zeros(count, EVENT_NAMESPACE.row_dtype)
    rows["timestamp_ms"] = index
    rows["event_key"] = index
    rows["item_id"] = index * 3
    rows["written_step"] = step
    rows["memory"] = 0 if step == RAW_STEP else 1
    return index * 7 % num_users, rows
