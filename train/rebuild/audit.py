"""Auditing the memory of a home on a Ray cluster: what `marm memory audit` calls."""

from __future__ import annotations

import time
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
from train.rebuild.auditor import AuditCounts, Auditor
from train.rebuild.compare import (
    AgeClass,
    LayerErrors,
    RowErrors,
    by_seconds,
    by_steps,
    summarize,
)
from train.rebuild.log_job import (
    Partitions,
    RebuildError,
    count_users,
    rows_per_user,
    run_tasks,
    tasks_in,
)
from train.rebuild.log_part import events_before
from train.rebuild.plan import buckets_of, plan_tasks
from train.rebuild.request import AuditRequest
from train.rebuild.weights import load_weights


@dataclass(frozen=True)
class AuditReport:
    """How far the stored rows of a sample of users are from fresh ones.

    Attributes:
        variant, version, step: the version that counts as fresh.
        counts: the sample, and how much of it is missing or raw.
        layers: errors of all memorised rows, by layer.
        by_steps: the same by age in steps before the version; newer rows come first.
        by_seconds: the same by age in seconds before now.
    """

    variant: str
    version: int
    step: int
    counts: AuditCounts
    layers: tuple[LayerErrors, ...]
    by_steps: tuple[AgeClass, ...]
    by_seconds: tuple[AgeClass, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values with the shares that people ask for."""
        rows = max(1, self.counts.rows)
        shares = {
            "missing_share": self.counts.missing_rows / rows,
            "raw_share": self.counts.raw_rows / rows,
        }
        return {**asdict(self), "counts": {**asdict(self.counts), **shares}}


class AuditWorker:
    """One process of an audit: holds the model and a client of the pool."""

    def __init__(
        self, weights: Any, pool: PoolInfo, partitions: Partitions, newest: int | None
    ) -> None:
        torch.set_num_threads(1)
        frozen = ray.get(weights)
        self._partitions, self._log = partitions, EventLog(partitions.log)
        self._auditor = Auditor(frozen, MemoryClient(pool, frozen.config.namespace), newest)

    def __call__(self, tasks: pa.Table) -> pa.Table:
        """Audit the users of ``tasks``: counts, and the errors of every compared row."""
        found = []
        for _, partition, user_ids in tasks_in(tasks):
            buckets = buckets_of(partition, self._partitions.count)
            batches = events_before(self._log, self._partitions.end, buckets)
            counts, errors = self._auditor.audit(batches, user_ids)
            columns = {name: array.tobytes() for name, array in vars(errors).items()}
            found.append({"counts": asdict(counts), "errors": columns})
        return pa.Table.from_pylist(found)


def audit_memory(home: Home, request: AuditRequest, pool: PoolInfo | None = None) -> AuditReport:
    """Recompute the rows of a uniform sample of the users in the log and compare; needs an
    initialised Ray and a started pool (None: the default pool of ``home``). Writes nothing.

    Raises:
        RebuildError: when the version has learned from no events, or a task failed.
        ModelRegistryError: when there is no such version.
    """
    weights = load_weights(ModelRegistry(home.models), request.variant, request.version)
    pool = pool if pool is not None else connect_pool(home)
    partitions = Partitions.of(home, weights.log_end, request.num_workers)
    activity = count_users(partitions)
    if not len(activity):
        raise RebuildError(
            f"version {weights.version} has learned from no event that is still in {home.log}; "
            "there is nothing to compare"
        )
    by_id = activity.take(np.argsort(activity.user_id))  # the sample depends on the seed alone
    size = min(request.num_users, len(by_id))
    sampled = np.random.default_rng(request.seed).choice(len(by_id), size, replace=False)
    tasks = plan_tasks(by_id.take(sampled), partitions.count)
    constructor = {
        "weights": ray.put(weights),
        "pool": pool,
        "partitions": partitions,
        "newest": rows_per_user(pool, request.newest),
    }
    counts, parts = AuditCounts(), []
    for table in run_tasks(tasks, AuditWorker, constructor, request.num_workers):
        for row in table.to_pylist():
            counts += AuditCounts(**row["counts"])
            parts.append(_errors_from(row["errors"], weights.config.depth))
    errors = RowErrors.concat(parts, weights.config.depth)
    return AuditReport(
        weights.variant,
        weights.version,
        weights.step,
        counts,
        summarize(errors),
        by_steps(errors, weights.step),
        by_seconds(errors, int(time.time())),
    )


def _errors_from(columns: dict[str, bytes], num_layers: int) -> RowErrors:
    step = np.frombuffer(columns["written_step"], np.int32)
    shape = (len(step), num_layers)
    return RowErrors(
        step,
        np.frombuffer(columns["written_s"], np.uint32),
        np.frombuffer(columns["error"], np.float32).reshape(shape),
        np.frombuffer(columns["cosine"], np.float32).reshape(shape),
    )
