"""Which users a rebuild takes on, in which order, and how the work is cut into tasks.

A task is some users of one partition of the user buckets, so that one process has the whole
histories of its users and reads only its partition of the log. Tiers put hot users first over all
partitions: every partition's part of tier 0 comes before any of tier 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marm.addressing import NUM_BUCKETS, user_bucket
from marm.events import EventBatch

NUM_TIERS = 8
"""Tiers of about equal work; more order users more finely and read the log more often."""

TASK_EVENTS = 500_000
"""Most events that one task should hold (about 100 bytes each, a few copies)."""

LEAST_TASK_EVENTS = 20_000
"""Smaller tasks, about a second of computing, would not be worth reading a partition again."""

RECENT_FRACTION = 0.1
"""The newest share of the log, whose events make a user hot."""


@dataclass(frozen=True)
class Activity:
    """Events of each user in a part of the log; columns of equal length, one entry per user."""

    user_id: NDArray[np.int64]
    num_events: NDArray[np.int64]
    num_recent: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.user_id)

    def take(self, index: NDArray) -> Activity:
        """The users at ``index`` (integers or a mask)."""
        return Activity(self.user_id[index], self.num_events[index], self.num_recent[index])

    @staticmethod
    def concat(parts: list[Activity]) -> Activity:
        """All users of ``parts``."""
        empty = np.empty(0, np.int64)
        return Activity(
            np.concatenate([empty, *(part.user_id for part in parts)]),
            np.concatenate([empty, *(part.num_events for part in parts)]),
            np.concatenate([empty, *(part.num_recent for part in parts)]),
        )


@dataclass(frozen=True)
class RebuildTask:
    """Users of one partition, hottest first."""

    tier: int
    partition: int
    user_ids: NDArray[np.int64]
    num_events: int


def measure_activity(
    batches: Iterable[EventBatch], num_rows: int, recent_fraction: float = RECENT_FRACTION
) -> Activity:
    """Count events by user, holding no more than one batch and the counts.

    ``batches`` are files of a log in order, ``num_rows`` rows in all (erased ones may be missing).
    Recent are the events of the last ``recent_fraction`` of them; of the file in which that part
    begins, whose rows are not in time order, those that are newest.
    """
    counts = Activity.concat([])
    first_recent = round(num_rows * (1.0 - recent_fraction))
    seen = 0
    for batch in batches:
        seen += len(batch)
        recent = _newest(batch.timestamp_ms, seen - first_recent)
        ids, row = np.unique(batch.user_id, return_inverse=True)
        found = Activity(
            ids, np.bincount(row, minlength=len(ids)), np.bincount(row[recent], minlength=len(ids))
        )
        counts = _sum_by_user(Activity.concat([counts, found]))
    return counts


def _newest(timestamp_ms: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    """Which of these times are the newest ``count`` (and those equal to the oldest of them)."""
    if count <= 0 or not len(timestamp_ms):
        return np.zeros(len(timestamp_ms), np.bool_)
    first = max(0, len(timestamp_ms) - count)
    return timestamp_ms >= np.partition(timestamp_ms, first)[first]


def _sum_by_user(counted: Activity) -> Activity:
    ids, row = np.unique(counted.user_id, return_inverse=True)
    events, recent = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    np.add.at(events, row, counted.num_events)
    np.add.at(recent, row, counted.num_recent)
    return Activity(ids, events, recent)


def choose_partitions(num_events: int, num_workers: int) -> int:
    """Partitions such that a tier gives every worker a task and no task is too large."""
    for_memory = -(-num_events // (NUM_TIERS * TASK_EVENTS))
    return int(np.clip(for_memory, num_workers, NUM_BUCKETS))


def partition_of(user_ids: NDArray[np.int64], num_partitions: int) -> NDArray[np.int64]:
    """The partition of each user: runs of neighbouring buckets."""
    return user_bucket(user_ids) * num_partitions // NUM_BUCKETS


def buckets_of(partition: int, num_partitions: int) -> NDArray[np.int64]:
    """The buckets of a partition."""
    buckets = np.arange(NUM_BUCKETS)
    return buckets[buckets * num_partitions // NUM_BUCKETS == partition]


def plan_tasks(
    activity: Activity, num_partitions: int, limit_users: int | None = None
) -> list[RebuildTask]:
    """Tasks that cover the users, at most the hottest ``limit_users``, in the order to run them."""
    # The id decides ties, so that equal logs give equal plans.
    order = np.lexsort((activity.user_id, -activity.num_events, -activity.num_recent))
    hot = activity.take(order[:limit_users])
    total = int(hot.num_events.sum())
    tier_events = int(
        np.clip(
            -(-total // NUM_TIERS),
            LEAST_TASK_EVENTS * num_partitions,
            TASK_EVENTS * num_partitions,
        )
    )
    tier = (np.cumsum(hot.num_events) - hot.num_events) // tier_events
    partition = partition_of(hot.user_id, num_partitions)
    task = tier * num_partitions + partition
    by_task = np.argsort(task, kind="stable")
    _, starts = np.unique(task[by_task], return_index=True)
    return [
        RebuildTask(
            int(tier[run[0]]),
            int(partition[run[0]]),
            hot.user_id[run],
            int(hot.num_events[run].sum()),
        )
        for run in np.split(by_task, starts[1:])
        if len(run)
    ]
