"""Exposure sequences (Eq. 1): which rows each query may see, and how far away they are.

Shape legend: B queries (events or candidates), U distinct users, N slab length, L stored layers,
D width of a stored vector.

A micro-batch holds many events of a user. An event's keys are its user's stored rows (the *slab*,
one per distinct user) and the earlier events of the same user in the batch (the *block*). Both are
masked by time and by distance, so that every event sees exactly its newest n predecessors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marm.events import TASKS, EventBatch, pack_feedback
from marm.memory import RAW_STEP, UserRows

NUM_DISTANCE_BUCKETS = 64
NUM_GAP_BUCKETS = 32


@dataclass(frozen=True)
class Queries:
    """What is asked: ``B`` targets, each of one user at one time."""

    user_row: NDArray[np.int64]  # [B] index into the users of the slab
    timestamp_ms: NDArray[np.int64]  # [B]


@dataclass(frozen=True)
class View:
    """What the queries see of one set of keys. Hidden keys have arbitrary distance and gap."""

    visible: NDArray[np.bool_]
    distance: NDArray[np.int64]  # bucket of the number of events in between
    gap: NDArray[np.int64]  # bucket of the time in between


@dataclass(frozen=True)
class Slab:
    """Stored rows of ``U`` users, newest first, padded to ``N`` columns."""

    rows: NDArray[np.void]  # [U, N] of a namespace's row dtype; padding is arbitrary
    present: NDArray[np.bool_]  # [U, N]

    @property
    def memorised(self) -> NDArray[np.bool_]:
        """Rows whose memory was computed; the others are raw and count at layer 0 only."""
        return self.present & (self.rows["written_step"] != RAW_STEP)

    @staticmethod
    def of(user_rows: UserRows, n: int) -> Slab:
        """The newest ``n`` rows of every user; fewer columns, but at least one, when no user has
        that many."""
        longest = int(user_rows.counts.max(initial=1))
        position, present = user_rows.newest_first(min(n, longest))
        if not len(user_rows.rows):
            return Slab(np.zeros(position.shape, user_rows.rows.dtype), present)
        return Slab(user_rows.rows[position], present)


def enters_sequence(events: EventBatch, sequence: str) -> NDArray[np.bool_]:
    """Which events become history: all, or those whose label ``sequence`` is positive."""
    if sequence == "all":
        return np.ones(len(events), np.bool_)
    return events.labels[:, TASKS.index(sequence)] > 0


def view_slab(slab: Slab, queries: Queries, newer_B: NDArray[np.int64], n: int) -> View:
    """Visibility of stored rows, ``[B, N]``.

    ``newer_B`` counts the predecessors of each query that are not in the slab (the block's), which
    push the oldest rows out of its window. Rows at or after a query's own time are hidden and do
    not count, so a slab may reach beyond the query (time travel).
    """
    stamps_BN = slab.rows["timestamp_ms"][queries.user_row]
    present_BN = slab.present[queries.user_row]
    past_BN = present_BN & (stamps_BN < queries.timestamp_ms[:, None])
    skipped_B = (present_BN & ~past_BN).sum(axis=1)
    rank = np.arange(stamps_BN.shape[1])
    distance_BN = rank[None, :] - skipped_B[:, None] + newer_B[:, None] + 1
    return View(
        past_BN & (distance_BN <= n),
        distance_bucket(distance_BN),
        gap_bucket(queries.timestamp_ms[:, None] - stamps_BN),
    )


def view_block(
    events: EventBatch, user_row: NDArray[np.int64], entering: NDArray[np.bool_], n: int
) -> tuple[View, NDArray[np.int64]]:
    """Visibility of the batch's own events, ``[B, B]`` (query, key), and each query's number of
    predecessors in the batch, ``[B]``.

    Strictly causal: an event sees events of its user with a smaller timestamp only.
    """
    stamps, keys, size = events.timestamp_ms, events.event_key, len(events)
    query, key = pairs_of_users(user_row, entering)
    past = stamps[key] < stamps[query]
    predecessors_B = np.bincount(query[past], minlength=size)
    # The ordinal of a key among its user's entering events in storage order.
    earlier = past | ((stamps[key] == stamps[query]) & (keys[key] < keys[query]))
    ordinal_B = np.bincount(query[earlier], minlength=size)
    distance = predecessors_B[query] - ordinal_B[key]
    seen = past & (distance <= n)
    query, key, distance = query[seen], key[seen], distance[seen]
    view = View(np.zeros((size, size), np.bool_), *np.zeros((2, size, size), np.int64))
    view.visible[query, key] = True
    view.distance[query, key] = distance_bucket(distance)
    view.gap[query, key] = gap_bucket(stamps[query] - stamps[key])
    return view, predecessors_B


def past_block(
    events: EventBatch, user_row: NDArray[np.int64], entering: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which of the batch's events are a query's past however far away, ``[B, B]`` (query, key)."""
    query, key = pairs_of_users(user_row, entering)
    past = events.timestamp_ms[key] < events.timestamp_ms[query]
    past_BB = np.zeros((len(events), len(events)), np.bool_)
    past_BB[query[past], key[past]] = True
    return past_BB


def pairs_of_users(
    user_row: NDArray[np.int64], entering: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All pairs (query, key) of events of one user of which the key enters the sequence: far fewer
    than all pairs of a batch of many users."""
    keys = np.flatnonzero(entering)
    keys = keys[np.argsort(user_row[keys], kind="stable")]
    counts_U = np.bincount(user_row[keys], minlength=int(user_row.max(initial=-1)) + 1)
    starts_U = np.cumsum(counts_U) - counts_U
    counts_B = counts_U[user_row]
    query = np.repeat(np.arange(len(user_row)), counts_B)
    ordinal = np.arange(len(query)) - np.repeat(np.cumsum(counts_B) - counts_B, counts_B)
    return query, keys[starts_U[user_row[query]] + ordinal]


def newest_of(past_BN: NDArray[np.bool_], stamps_BN: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The newest of what is a query's past; several where they are simultaneous."""
    never = np.iinfo(np.int64).min
    newest_B = np.where(past_BN, stamps_BN, never).max(axis=1, initial=never)
    return past_BN & (stamps_BN == newest_B[:, None])


def newest_memorised(slab: Slab, queries: Queries) -> NDArray[np.bool_]:
    """The newest memorised rows before each query, ``[B, N]``, also beyond its window; several
    where they are simultaneous."""
    stamps_BN = slab.rows["timestamp_ms"][queries.user_row]
    past_BN = slab.memorised[queries.user_row] & (stamps_BN < queries.timestamp_ms[:, None])
    return newest_of(past_BN, stamps_BN)


def distance_bucket(distance: NDArray[np.int64]) -> NDArray[np.int64]:
    """Four buckets per doubling of the distance in events; distances below 1 fall in bucket 0."""
    bucket = np.floor(4.0 * np.log2(np.maximum(distance, 1).astype(np.float32)))
    return np.minimum(bucket, NUM_DISTANCE_BUCKETS - 1).astype(np.int64)


def gap_bucket(gap_ms: NDArray[np.int64]) -> NDArray[np.int64]:
    """One bucket per doubling of the time gap from a second on; shorter gaps fall in bucket 0."""
    seconds = np.maximum(gap_ms, 0).astype(np.float32) / 1000.0
    bucket = np.floor(np.log2(1.0 + seconds))
    return np.minimum(bucket, NUM_GAP_BUCKETS - 1).astype(np.int64)


def raw_rows(events: EventBatch, row_dtype: np.dtype) -> NDArray[np.void]:
    """Events as rows that carry no memory yet (`RAW_STEP`), in the order of ``events``."""
    rows = np.zeros(len(events), row_dtype)
    for name in ("event_key", "item_id", "timestamp_ms", "author_id", "tag_id", "context_id"):
        rows[name] = getattr(events, name)
    rows["feedback"] = pack_feedback(events.labels)
    rows["written_step"] = RAW_STEP
    return rows
