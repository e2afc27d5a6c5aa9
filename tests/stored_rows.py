"""Rows that prove themselves, random batches, and comparing what two stores give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.shard_store import ShardStore
from marm.addressing import combine64, user_bucket
from marm.memory import RAW_STEP, Namespace, UserRows

OpenStore = Callable[..., ShardStore]

ALL = 1 << 40
INT64 = np.iinfo(np.int64)


def proven_rows(
    namespace: Namespace, user_ids: NDArray[np.int64], times_ms: NDArray[np.int64], step: int = 1
) -> NDArray[np.void]:
    """One row of each user at a time. All of a row follows from user, time and step, so that
    `are_proven` finds a row that was torn, or belongs to somebody else."""
    users, times = np.asarray(user_ids, np.int64), np.asarray(times_ms, np.int64)
    rows = np.zeros(len(users), namespace.row_dtype)
    proof = combine64(users, times, np.full(len(users), step))
    rows["event_key"] = proof
    rows["timestamp_ms"] = times
    rows["item_id"] = users
    rows["author_id"] = proof.view(np.int64)
    rows["tag_id"] = (proof >> np.uint64(32)).astype(np.int64)
    rows["written_step"] = step
    rows["written_s"] = (proof & np.uint64(0xFFFF)).astype(np.uint32)
    if rows["memory"].size:
        lane = np.arange(rows["memory"][0].size, dtype=np.uint64).reshape(rows["memory"].shape[1:])
        mixed = proof[:, None, None] ^ (lane * np.uint64(0x9E3779B97F4A7C15))
        rows["memory"] = (mixed >> np.uint64(54)).astype(np.float32) / 512 - 1
    return rows


def are_proven(namespace: Namespace, found: UserRows) -> bool:
    """Whether every row found is one that `proven_rows` made for its user."""
    users = np.repeat(found.user_ids, found.counts)
    rows = found.rows
    for step in np.unique(rows["written_step"]).tolist():
        mine = rows["written_step"] == step
        expected = proven_rows(namespace, users[mine], rows["timestamp_ms"][mine], step)
        if expected.tobytes() != rows[mine].tobytes():
            return False
    return True


def series(
    namespace: Namespace, num_users: int, per_user: int, start_ms: int = 0, step: int = 1
) -> tuple[NDArray[np.int64], NDArray[np.void]]:
    """``per_user`` proven rows of users 0, 1, ..., interleaved in time as a log has them."""
    count = num_users * per_user
    users = np.arange(count, dtype=np.int64) % num_users
    return users, proven_rows(namespace, users, start_ms + np.arange(count), step)


@dataclass(frozen=True)
class RandomRows:
    """Batches with rows that arrive late, come twice, are raw, and carry feedback."""

    namespace: Namespace
    rng: np.random.Generator
    users: NDArray[np.int64]

    def batch(self, count: int, span_ms: int) -> tuple[NDArray[np.int64], NDArray[np.void]]:
        rng = self.rng
        rows = np.zeros(count, self.namespace.row_dtype)
        rows["timestamp_ms"] = rng.integers(-span_ms, span_ms, count)
        rows["event_key"] = rng.integers(0, 3, count)
        rows["item_id"] = rng.integers(INT64.min, INT64.max, count)
        rows["feedback"] = rng.integers(0, 1 << 12, count)
        rows["written_step"] = rng.integers(RAW_STEP, 4, count)
        is_raw = rows["written_step"] == RAW_STEP
        rows["written_s"] = np.where(is_raw, 0, rng.integers(0, 1 << 32, count))
        rows["memory"] = rng.normal(size=rows["memory"].shape)
        rows["memory"][is_raw] = 0
        return rng.choice(self.users, count), rows


def assert_same(found: UserRows, expected: UserRows) -> None:
    """Both hold the same rows of the same users, byte by byte."""
    assert found.user_ids.tolist() == expected.user_ids.tolist()
    assert found.offsets.tolist() == expected.offsets.tolist()
    assert found.rows.dtype == expected.rows.dtype
    assert found.rows.tobytes() == expected.rows.tobytes()


def users_of_bucket(bucket: int, count: int) -> NDArray[np.int64]:
    """The first users of a bucket."""
    users = np.arange(count * 1000, dtype=np.int64)
    return users[user_bucket(users) == bucket][:count]


def as_user_rows(user_id: int, rows: NDArray[np.void]) -> UserRows:
    """The rows of one user."""
    return UserRows(np.array([user_id]), np.array([0, len(rows)]), rows)
