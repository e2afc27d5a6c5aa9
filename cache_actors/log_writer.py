"""The one writer of a home's event log for live feedback: a named, detached Ray actor."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cache_actors.event_log.log import EventLog
from cache_actors.group_commit import (
    DEFAULT_COMMIT_EVENTS,
    DEFAULT_COMMIT_INTERVAL_MS,
    CommitQueue,
    CommitStats,
    GroupCommitter,
    RecentReports,
)
from cache_actors.home import Home
from marm.events import EventBatch

CODE_EPOCH = 1
"""Raise when the actor's code changes: a detached actor goes on running the code it began with."""

MAX_CONCURRENT_APPENDS = 1000
DEFAULT_APPEND_TIMEOUT_S = 30.0

_RETRY_PAUSE_S = 0.1


@dataclass(frozen=True)
class LogWriterInfo:
    """Where a writer runs and what it has done since it started."""

    node_id: str
    pid: int
    log_path: Path
    last_segment: int
    num_pending: int
    stats: CommitStats
    problems: list[str]


class LogWriterActor:
    """Gathers appends of all callers into group commits; see `CommitQueue`."""

    def __init__(self, log_path: Path, interval_ms: int, max_events: int) -> None:
        self._log_path = log_path
        self._log = EventLog(log_path)
        self._log.remove_abandoned()
        self._committer = GroupCommitter(self._log, RecentReports.of_log(self._log))
        self._interval_ms, self._max_events = interval_ms, max_events
        self._queue: CommitQueue | None = None

    async def append(self, events: EventBatch) -> list[bool]:
        """See `LogWriter.append`."""
        return await self._open_queue().append(events)

    async def flush(self) -> None:
        """Return when everything accepted so far is committed."""
        await self._open_queue().flush()

    async def describe(self) -> LogWriterInfo:
        """Where this writer runs and what it has done."""
        return LogWriterInfo(
            ray.get_runtime_context().get_node_id(),
            os.getpid(),
            self._log_path,
            self._log.last_segment(),
            self._open_queue().num_pending,
            self._committer.stats,
            self._log.problems,
        )

    def _open_queue(self) -> CommitQueue:
        if self._queue is None:  # made on the event loop that it lives on
            self._queue = CommitQueue(self._committer, self._interval_ms, self._max_events)
        return self._queue


class LogWriter:
    """A handle on the writer; made by `connect_log_writer`, cheap, and safe to share by threads.

    An append that meets a restart of the writer is sent again until it is acknowledged or times
    out. What the first attempt had committed then counts as a duplicate, so nothing is lost and
    nothing is written twice.
    """

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._actor = connect()

    def append(self, events: EventBatch, timeout_s: float = DEFAULT_APPEND_TIMEOUT_S) -> list[bool]:
        """Return once ``events`` are durable; for each whether it was appended (else it was a
        duplicate of an event with the same feedback).

        Raises `LogBackpressureError` when the writer is overloaded, ``ValueError`` for malformed
        events, and ``TimeoutError`` or Ray's actor error when time runs out.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                left_s = max(deadline - time.monotonic(), 0.0)
                return ray.get(self._actor.append.remote(events), timeout=left_s)
            except (ActorDiedError, ActorUnavailableError) as error:
                self._reconnect_before(deadline, error)

    async def append_async(
        self, events: EventBatch, timeout_s: float = DEFAULT_APPEND_TIMEOUT_S
    ) -> list[bool]:
        """`append` for use on an event loop."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                left_s = max(deadline - time.monotonic(), 0.0)
                return await asyncio.wait_for(self._actor.append.remote(events), left_s)
            except (ActorDiedError, ActorUnavailableError) as error:
                await asyncio.to_thread(self._reconnect_before, deadline, error)

    def flush(self, timeout_s: float = DEFAULT_APPEND_TIMEOUT_S) -> None:
        """Return when everything accepted so far is committed."""
        ray.get(self._actor.flush.remote(), timeout=timeout_s)

    def describe(self, timeout_s: float = DEFAULT_APPEND_TIMEOUT_S) -> LogWriterInfo:
        """Where the writer runs and what it has done."""
        return ray.get(self._actor.describe.remote(), timeout=timeout_s)

    def _reconnect_before(self, deadline: float, error: Exception) -> None:
        if time.monotonic() + _RETRY_PAUSE_S >= deadline:
            raise error
        time.sleep(_RETRY_PAUSE_S)
        if isinstance(error, ActorDiedError):  # stopped for good: its name is free for a new one
            self._actor = self._connect()


def connect_log_writer(
    home: Home,
    ray_namespace: str = "marm",
    interval_ms: int = DEFAULT_COMMIT_INTERVAL_MS,
    max_events: int = DEFAULT_COMMIT_EVENTS,
) -> LogWriter:
    """The home's writer, started if it is not running. Concurrent calls get the same one, with
    the settings of whoever came first."""
    home.create()
    actor_class = ray.remote(LogWriterActor)

    def connect() -> Any:
        return actor_class.options(
            name=log_writer_name(home),
            namespace=ray_namespace,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=MAX_CONCURRENT_APPENDS,
            # Here the home is known to exist; other nodes see it only on a shared file system.
            scheduling_strategy=NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=True
            ),
        ).remote(home.log, interval_ms, max_events)

    return LogWriter(connect)


def stop_log_writer(home: Home, ray_namespace: str = "marm") -> bool:
    """Commit what is pending and stop the home's writer; false when none runs."""
    try:
        actor = ray.get_actor(log_writer_name(home), namespace=ray_namespace)
    except ValueError:
        return False
    ray.get(actor.flush.remote())
    ray.kill(actor)
    return True


def log_writer_name(home: Home) -> str:
    """The actor's name: one per home and version of the code."""
    digest = hashlib.sha256(str(home.path).encode()).hexdigest()[:16]
    return f"marm-log-writer-{digest}-c{CODE_EPOCH}"
