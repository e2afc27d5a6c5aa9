"""Putting the answers of several shards together in the order of the question."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marm.memory import UserRows


@dataclass(frozen=True)
class ShardAnswer:
    """The rows of the users at ``positions`` of a batch."""

    positions: NDArray[np.int64]
    rows: UserRows


def gather_rows(
    user_ids: NDArray[np.int64], row_dtype: np.dtype, answers: list[ShardAnswer]
) -> UserRows:
    """The rows of ``user_ids``; users that no answer covers get an empty run."""
    if len(answers) == 1 and len(answers[0].positions) == len(user_ids):
        return answers[0].rows
    counts = np.zeros(len(user_ids) + 1, np.int64)
    parts: list[memoryview] = [memoryview(b"")] * len(user_ids)
    for answer in answers:
        counts[answer.positions + 1] = answer.rows.counts
        data = np.ascontiguousarray(answer.rows.rows).view(np.uint8).reshape(-1).data
        edges = (answer.rows.offsets * row_dtype.itemsize).tolist()
        for index, position in enumerate(answer.positions.tolist()):
            parts[position] = data[edges[index] : edges[index + 1]]
    joined = bytearray().join(parts)
    return UserRows(user_ids, np.cumsum(counts), np.frombuffer(joined, row_dtype))
