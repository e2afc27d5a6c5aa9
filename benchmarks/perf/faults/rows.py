"""Rows that prove themselves: every byte follows from the user, the row's number and its step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from marm.addressing import combine64
from marm.memory import Namespace

_START_MS = 1_700_000_000_000
_GAP_MS = 1_000
_EXACT_BITS = 11  # float16 holds every integer below 2048


def make_rows(
    namespace: Namespace,
    user_ids: NDArray[np.int64],
    numbers: NDArray[np.int64],
    steps: NDArray[np.int64],
) -> NDArray[np.void]:
    """Row ``numbers[i]`` of ``user_ids[i]`` as step ``steps[i]`` computed it.

    A row's number is its ``item_id`` and orders the rows of a user in time.
    """
    rows = np.zeros(len(user_ids), namespace.row_dtype)
    rows["event_key"] = combine64(user_ids, numbers)
    rows["item_id"] = numbers
    rows["timestamp_ms"] = _START_MS + numbers * _GAP_MS
    rows["author_id"] = rows["event_key"] >> np.uint64(30)
    rows["tag_id"] = user_ids & 0xFFFF
    rows["context_id"] = numbers & 0xFF
    rows["feedback"] = rows["event_key"] & np.uint64(0xF)
    rows["written_step"] = steps
    rows["written_s"] = _START_MS // 1_000 + steps
    numbers_per_row = namespace.depth * namespace.dim
    odd = np.arange(numbers_per_row, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    content = combine64(user_ids, numbers, steps)[:, None] * odd
    exact = (content >> np.uint64(64 - _EXACT_BITS)).astype(namespace.memory_dtype)
    rows["memory"] = exact.reshape(-1, namespace.depth, namespace.dim)
    return rows


def is_wrong(
    namespace: Namespace, user_ids: NDArray[np.int64], rows: NDArray[np.void]
) -> NDArray[np.bool_]:
    """Which rows are not, byte for byte, what ``user_ids[i]`` can have: torn, mixed or foreign."""
    numbers, steps = rows["item_id"], rows["written_step"].astype(np.int64)
    expected = make_rows(namespace, user_ids, numbers, steps)
    wrong: NDArray[np.bool_] = np.any(_byte_table(rows) != _byte_table(expected), axis=1)
    return wrong


def _byte_table(rows: NDArray[np.void]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), rows.dtype.itemsize)
