"""Plans: hot users first over all partitions, every user once, tasks of bounded size."""

from __future__ import annotations

import numpy as np
import pytest
from sample_events import make_events

from marm.addressing import NUM_BUCKETS
from marm.events import EventBatch
from train.rebuild import plan
from train.rebuild.plan import (
    Activity,
    buckets_of,
    choose_partitions,
    measure_activity,
    partition_of,
    plan_tasks,
)


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a test-sized log reaches."""
    monkeypatch.setattr(plan, "TASK_EVENTS", 500)
    monkeypatch.setattr(plan, "LEAST_TASK_EVENTS", 10)


def random_activity(num_users: int = 600) -> Activity:
    rng = np.random.default_rng(0)
    events = rng.geometric(0.05, num_users)
    return Activity(rng.permutation(num_users) * 7, events, rng.integers(0, events + 1))


@pytest.mark.parametrize("cuts", [[30], [95], [80], [10, 50, 85, 86], []])
def test_activity_counts_events_and_recent_ones(cuts: list[int]) -> None:
    events = make_events(100, 5)
    batches = []
    for index in np.split(np.arange(100), cuts):
        by_user = index[np.argsort(events.user_id[index], kind="stable")]  # as in a file
        batches.append(events.take(by_user))
    activity = measure_activity(batches, 100, 0.2)
    assert activity.user_id.tolist() == np.unique(events.user_id).tolist()
    for user, total, recent in zip(
        activity.user_id, activity.num_events, activity.num_recent, strict=True
    ):
        assert total == (events.user_id == user).sum()
        assert recent == (events.user_id[80:] == user).sum()


def test_a_log_without_events_has_no_active_users() -> None:
    assert len(measure_activity([], 0)) == 0
    assert len(measure_activity([EventBatch.empty()], 3)) == 0  # all erased
    assert plan_tasks(measure_activity([], 0), 4) == []


@pytest.mark.usefixtures("small_tasks")
def test_tasks_cover_every_user_once_in_his_partition() -> None:
    activity = random_activity()
    tasks = plan_tasks(activity, 6)
    users = np.concatenate([task.user_ids for task in tasks])
    assert sorted(users.tolist()) == sorted(activity.user_id.tolist())
    for task in tasks:
        assert (partition_of(task.user_ids, 6) == task.partition).all()
    assert sum(task.num_events for task in tasks) == activity.num_events.sum()


@pytest.mark.usefixtures("small_tasks")
def test_hot_users_come_first() -> None:
    activity = random_activity()
    recent = dict(zip(activity.user_id.tolist(), activity.num_recent.tolist(), strict=True))
    tasks = plan_tasks(activity, 3)
    assert [task.tier for task in tasks] == sorted(task.tier for task in tasks)
    assert tasks[-1].tier >= 4
    coldest = None
    for tier in range(tasks[-1].tier + 1):
        heat = [recent[u] for task in tasks if task.tier == tier for u in task.user_ids.tolist()]
        assert coldest is None or max(heat) <= coldest
        coldest = min(heat)
    for task in tasks:
        heat = [recent[user] for user in task.user_ids.tolist()]
        assert heat == sorted(heat, reverse=True)


def test_a_limit_takes_the_hottest() -> None:
    activity = random_activity()
    tasks = plan_tasks(activity, 4, limit_users=10)
    chosen = np.concatenate([task.user_ids for task in tasks])
    recent = activity.num_recent[np.isin(activity.user_id, chosen)]
    assert len(chosen) == 10
    assert recent.min() >= np.sort(activity.num_recent)[-10]


@pytest.mark.usefixtures("small_tasks")
def test_tasks_are_bounded() -> None:
    activity = random_activity()
    longest = int(activity.num_events.max())
    partitions = choose_partitions(int(activity.num_events.sum()), 1)
    for task in plan_tasks(activity, partitions):
        # A tier spreads over partitions by hash, so evenly but for chance.
        assert task.num_events <= 2 * plan.TASK_EVENTS + longest


@pytest.mark.parametrize("num_partitions", [1, 3, 256])
def test_partitions_share_out_the_buckets(num_partitions: int) -> None:
    parts = [buckets_of(partition, num_partitions) for partition in range(num_partitions)]
    assert np.concatenate(parts).tolist() == list(range(NUM_BUCKETS))


@pytest.mark.parametrize(
    ("num_events", "num_workers", "expected"),
    [(0, 2, 2), (1_000_000, 1, 1), (20_000_000, 4, 5), (10**12, 4, NUM_BUCKETS)],
)
def test_enough_partitions_for_workers_and_memory(
    num_events: int, num_workers: int, expected: int
) -> None:
    assert choose_partitions(num_events, num_workers) == expected
