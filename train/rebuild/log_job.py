"""The Ray Data side that rebuild and audit share: counting users, and running tasks in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from ray.exceptions import RayError

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.home import Home
from cache_actors.pool.shard_link import PoolInfo
from train.rebuild.log_part import events_before, num_rows_before
from train.rebuild.plan import (
    Activity,
    RebuildTask,
    buckets_of,
    choose_partitions,
    measure_activity,
    partition_of,
)

_ACTIVITY_SCHEMA = pa.schema(
    [("user_id", pa.int64()), ("num_events", pa.int64()), ("num_recent", pa.int64())]
)


class RebuildError(RuntimeError):
    """A rebuild or an audit ended without finishing; the message says why and what to do."""


@dataclass(frozen=True)
class Partitions:
    """A part of a log by partitions of the user buckets."""

    log: Path
    end: LogOffsets
    count: int

    @staticmethod
    def of(home: Home, end: LogOffsets, num_workers: int) -> Partitions:
        """Enough partitions for the workers and for tasks of bounded size.

        Raises:
            RebuildError: when the log holds no events at all.
        """
        num_events = EventLog(home.log).num_events()
        if not num_events:
            raise RebuildError(
                f"the event log in {home.log} holds no events; rows are recomputed from it, so "
                "there is nothing to do"
            )
        return Partitions(home.log, end, choose_partitions(num_events, num_workers))

    def holding(self, user_ids: NDArray[np.int64] | None) -> list[int]:
        """The partitions of these users; None: all."""
        if user_ids is None:
            return list(range(self.count))
        return np.unique(partition_of(user_ids, self.count)).tolist()

    def activity(self, partition: int) -> Activity:
        """Events of every user of a partition."""
        log, buckets = EventLog(self.log), buckets_of(partition, self.count)
        num_rows = num_rows_before(log, self.end, buckets)
        return measure_activity(events_before(log, self.end, buckets), num_rows)


def rows_per_user(pool: PoolInfo, asked: int | None) -> int | None:
    """Newest rows of a user to look after: no more than the pool keeps, or each run would find the
    others missing."""
    bounds = [bound for bound in (asked, pool.config.limits.max_rows_per_user) if bound is not None]
    return min(bounds, default=None)


def count_users(partitions: Partitions, user_ids: NDArray[np.int64] | None = None) -> Activity:
    """Every user (or those of ``user_ids``) who has events, counted by Ray Data in parallel."""
    rows = [{"partition": partition} for partition in partitions.holding(user_ids)]
    dataset = quiet(ray.data.from_items(rows, override_num_blocks=len(rows)))
    counted = dataset.map_batches(
        _count_partition,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"partitions": partitions, "user_ids": user_ids},
    )
    parts = [
        Activity(*(batch.column(name).to_numpy() for name in _ACTIVITY_SCHEMA.names))
        for batch in results(counted)
    ]
    return Activity.concat(parts)


def _count_partition(
    batch: pa.Table, partitions: Partitions, user_ids: NDArray[np.int64] | None
) -> pa.Table:
    parts = [partitions.activity(row["partition"]) for row in batch.to_pylist()]
    found = Activity.concat(parts)
    if user_ids is not None:
        found = found.take(np.isin(found.user_id, user_ids))
    columns = (found.user_id, found.num_events, found.num_recent)
    return pa.table(list(columns), schema=_ACTIVITY_SCHEMA)


def run_tasks(
    tasks: Sequence[RebuildTask],
    worker: type,
    constructor: dict[str, Any],
    num_workers: int,
) -> Iterator[pa.Table]:
    """Run ``worker(**constructor)(task table)`` over all tasks, in order of start, on a pool of
    ``num_workers`` actors; what they return, as it comes. A task of a lost actor is run again."""
    tables = [
        pa.table({"task": [index], "partition": [task.partition], "user_ids": [task.user_ids]})
        for index, task in enumerate(tasks)
    ]
    dataset = quiet(ray.data.from_arrow(tables))
    yield from results(
        dataset.map_batches(
            worker,
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(num_workers, len(tables))),
            fn_constructor_kwargs=constructor,
            num_cpus=1,
        )
    )


def tasks_in(table: pa.Table) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
    """The (task, partition, users) that a worker of `run_tasks` is handed."""
    for task, partition, users in zip(
        table.column("task").to_pylist(),
        table.column("partition").to_pylist(),
        table.column("user_ids"),
        strict=True,
    ):
        yield task, partition, users.values.to_numpy(zero_copy_only=False).astype(np.int64)


def quiet(dataset: ray.data.Dataset) -> ray.data.Dataset:
    """The dataset without progress bars, as commands show their own, and with plain errors."""
    dataset.context.enable_progress_bars = False
    dataset.context.raise_original_map_exception = True
    return dataset


def results(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    """The blocks of a dataset as they are done.

    Raises:
        RebuildError: when a task failed for good.
    """
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    except RayError as error:
        raise RebuildError(
            f"a task failed: {root_cause(error)}; rows written so far stay, and a new run of the "
            "same version continues after them"
        ) from error


def root_cause(error: BaseException) -> str:
    """The innermost error of one that Ray wrapped, without the advice that Ray appends."""
    cause: BaseException = error
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None:
        cause = inner
    return f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
