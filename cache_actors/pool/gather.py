"""Putting the answers of several shards together in the order of the question."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache_actors.pool.errors import PartlyUnavailable
from cache_actors.store.lookup import Lookup, UserState
from marm.memory import UserRows


@dataclass(frozen=True)
class ShardAnswer:
    """What a shard knows of the users at ``positions`` of a batch."""

    positions: NDArray[np.int64]
    found: Lookup


def known_part(positions: NDArray[np.int64], error: PartlyUnavailable) -> ShardAnswer:
    """What a shard's answer says of the users at ``positions`` that it could be had for."""
    known = np.flatnonzero(~error.missing)
    rows = error.found.rows
    parts = [rows.of(index) for index in known.tolist()]
    packed = np.concatenate([rows.rows[:0], *parts])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows.counts[known])])
    found = Lookup(UserRows(rows.user_ids[known], offsets, packed), error.found.state[known])
    return ShardAnswer(positions[known], found)


def gather(user_ids: NDArray[np.int64], row_dtype: np.dtype, answers: list[ShardAnswer]) -> Lookup:
    """The rows of ``user_ids``. Users that no answer covers are absent; of those that several
    cover, the last answer counts."""
    if len(answers) == 1 and len(answers[0].positions) == len(user_ids):
        return answers[0].found
    state = np.full(len(user_ids), UserState.ABSENT, np.uint8)
    counts = np.zeros(len(user_ids) + 1, np.int64)
    parts: list[memoryview] = [memoryview(b"")] * len(user_ids)
    for answer in answers:
        rows = answer.found.rows
        state[answer.positions] = answer.found.state
        counts[answer.positions + 1] = rows.counts
        data = np.ascontiguousarray(rows.rows).view(np.uint8).reshape(-1).data
        edges = (rows.offsets * row_dtype.itemsize).tolist()
        for index, position in enumerate(answer.positions.tolist()):
            parts[position] = data[edges[index] : edges[index + 1]]
    joined = bytearray().join(parts)
    rows = UserRows(user_ids, np.cumsum(counts), np.frombuffer(joined, row_dtype))
    return Lookup(rows, state)
