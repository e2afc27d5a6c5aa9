"""Rebuilding the memory of a home on a Ray cluster: what `marm memory rebuild` calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from cache_actors.event_log.log import EventLog
from cache_actors.home import Home
from cache_actors.pool.client import MemoryClient
from cache_actors.pool.lifecycle import connect_pool
from cache_actors.pool.shard_link import PoolInfo
from cache_actors.registry import ModelRegistry
from train.rebuild.log_job import Partitions, count_users, rows_per_user, run_tasks, tasks_in
from train.rebuild.log_part import events_before
from train.rebuild.plan import buckets_of, plan_tasks
from train.rebuild.rebuilder import Rebuilder, TaskReport
from train.rebuild.request import RebuildRequest
from train.rebuild.stored import DueRule
from train.rebuild.weights import load_weights


@dataclass(frozen=True)
class RebuildProgress:
    """A moment of a rebuild."""

    events_done: int  # of the users that were looked after so far
    events_total: int
    report: TaskReport


@dataclass(frozen=True)
class RebuildReport:
    """What a rebuild did.

    Attributes:
        variant, version, step: the version that computed the rows.
        users_without_events: users that were asked for and have no events in the log.
        tasks: pieces of work.
        done: counts of users and rows.
    """

    variant: str
    version: int
    step: int
    users_without_events: int
    tasks: int
    done: TaskReport


class RebuildWorker:
    """One process of a rebuild: holds the model and a client of the pool."""

    def __init__(
        self,
        weights: Any,
        pool: PoolInfo,
        partitions: Partitions,
        rule: DueRule,
        newest: int | None,
    ) -> None:
        torch.set_num_threads(1)
        frozen = ray.get(weights)
        self._partitions, self._log = partitions, EventLog(partitions.log)
        memory = MemoryClient(pool, frozen.config.namespace)
        self._rebuilder = Rebuilder(frozen, memory, rule, newest)

    def __call__(self, tasks: pa.Table) -> pa.Table:
        """Rebuild the users of ``tasks``; one row of counts each."""
        reports = []
        for task, partition, user_ids in tasks_in(tasks):
            buckets = buckets_of(partition, self._partitions.count)
            batches = events_before(self._log, self._partitions.end, buckets)
            report = self._rebuilder.rebuild(batches, user_ids)
            reports.append({"task": task, "report": asdict(report)})
        return pa.Table.from_pylist(reports)


def rebuild_memory(
    home: Home,
    request: RebuildRequest,
    pool: PoolInfo | None = None,
    on_progress: Callable[[RebuildProgress], None] | None = None,
) -> RebuildReport:
    """Recompute rows from the log with published weights, hot users first; needs an initialised
    Ray and a started pool (None: the default pool of ``home``).

    Only the part of the log that the version has learned from is rebuilt: what comes after it is
    training's to write. Rows are upserted like any other, so training and serving go on meanwhile,
    and a rebuild that was cut short continues when it is started again with the same version.

    Raises:
        RebuildError: when the log is empty or a task failed.
        ModelRegistryError: when there is no such version.
    """
    weights = load_weights(ModelRegistry(home.models), request.variant, request.version)
    pool = pool if pool is not None else connect_pool(home)
    partitions = Partitions.of(home, weights.log_end, request.num_workers)
    asked = None if request.user_ids is None else np.unique(np.array(request.user_ids, np.int64))
    activity = count_users(partitions, asked)
    tasks = plan_tasks(activity, partitions.count, request.limit_users)
    done, events_done = TaskReport(), 0
    total = sum(task.num_events for task in tasks)
    constructor = {
        "weights": ray.put(weights),
        "pool": pool,
        "partitions": partitions,
        "rule": request.rule(weights.step),
        "newest": rows_per_user(pool, request.newest),
    }
    if tasks:
        for table in run_tasks(tasks, RebuildWorker, constructor, request.num_workers):
            for row in table.to_pylist():
                done += TaskReport(**row["report"])
                events_done += tasks[row["task"]].num_events
                if on_progress is not None:
                    on_progress(RebuildProgress(events_done, total, done))
    absent = 0 if asked is None else len(asked) - len(activity)
    return RebuildReport(weights.variant, weights.version, weights.step, absent, len(tasks), done)
