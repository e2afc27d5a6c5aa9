"""Group commit: many small appends to the event log become one durable segment, without repeats."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.schema import check_events
from marm.addressing import combine64
from marm.events import EventBatch

DEFAULT_COMMIT_INTERVAL_MS = 100
DEFAULT_COMMIT_EVENTS = 4096
DEFAULT_RECENT_EVENTS = 1_000_000
DEFAULT_MAX_PENDING_EVENTS = 200_000
MAX_RELOADED_SEGMENTS = 10_000  # bounds the time that a start takes on a log of tiny segments

_UNOBSERVED_BITS = np.uint32(0x7FC00000)  # one bit pattern for every NaN


class LogBackpressureError(RuntimeError):
    """More events wait for a commit than the writer accepts; try again later."""


@dataclass(frozen=True)
class CommitStats:
    """What a writer has done since it started."""

    appended: int
    duplicates: int
    commits: int


def report_identity(events: EventBatch) -> NDArray[np.uint64]:
    """One number per report: the same event with the same feedback has the same number.

    The timestamp is left out, so a client that repeats a request is recognised also where the
    server stamps the time; other feedback for the same event is a new report.
    """
    labels = np.asarray(events.labels, np.float32) + np.float32(0.0)  # -0.0 becomes 0.0
    bits = np.where(np.isnan(labels), _UNOBSERVED_BITS, labels.view(np.uint32))
    return combine64(events.event_key, events.user_id, events.item_id, *bits.T)


class RecentReports:
    """The identities of the most recent reports, up to a capacity."""

    def __init__(self, capacity: int = DEFAULT_RECENT_EVENTS) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self._capacity = capacity
        self._seen: dict[int, None] = {}  # insertion order: oldest first

    def __len__(self) -> int:
        return len(self._seen)

    def unseen(self, identities: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which reports are neither known nor repeated earlier in ``identities``."""
        fresh = np.zeros(len(identities), np.bool_)
        if len(identities):
            fresh[np.unique(identities, return_index=True)[1]] = True
        known = [identity in self._seen for identity in identities.tolist()]
        return fresh & ~np.array(known, np.bool_)

    def remember(self, identities: NDArray[np.uint64]) -> None:
        """Add reports, forgetting the oldest ones beyond the capacity."""
        self._seen.update(dict.fromkeys(identities[-self._capacity :].tolist()))
        excess = len(self._seen) - self._capacity
        for oldest in list(islice(self._seen, max(excess, 0))):
            del self._seen[oldest]

    @staticmethod
    def of_log(log: EventLog, capacity: int = DEFAULT_RECENT_EVENTS) -> RecentReports:
        """The reports of the newest events of ``log``, from a bounded number of segments."""
        runs: list[NDArray[np.uint64]] = []
        for events in _newest_first(log):
            runs.append(report_identity(events))
            if sum(len(run) for run in runs) >= capacity:
                break
        recent = RecentReports(capacity)
        for run in reversed(runs):
            recent.remember(run)
        return recent


class GroupCommitter:
    """Appends groups of batches to a log, each report once. One at a time."""

    def __init__(self, log: EventLog, recent: RecentReports) -> None:
        self._log = log
        self._recent = recent
        self.stats = CommitStats(0, 0, 0)

    def commit(self, batches: list[EventBatch]) -> list[list[bool]]:
        """Make the new events of ``batches`` durable; for each event whether it was appended
        (true) or not (false: a duplicate, or older than when its user was forgotten). If this
        raises, nothing was appended."""
        events = EventBatch.concat(batches)
        identities = report_identity(events)
        # A client that repeats old feedback must not bring back what its user had forgotten.
        fresh = self._recent.unseen(identities) & ~self._log.forgets(events)
        if fresh.any():
            self._log.append(events.take(fresh))
        self._recent.remember(identities[fresh])  # only now: a failed append may be tried again
        appended = int(fresh.sum())
        self.stats = CommitStats(
            self.stats.appended + appended,
            self.stats.duplicates + len(events) - appended,
            self.stats.commits + int(appended > 0),
        )
        ends = np.cumsum([len(batch) for batch in batches])[:-1]
        return [part.tolist() for part in np.split(fresh, ends)]


@dataclass(frozen=True)
class _Waiting:
    events: EventBatch
    outcome: asyncio.Future[list[bool]]


class CommitQueue:
    """Collects batches for a moment and commits them together; lives on one event loop.

    A group closes ``interval_ms`` after its first batch arrived, or when it holds ``max_events``.
    Commits run on a thread, one after the other, while the next group gathers.
    """

    def __init__(
        self,
        committer: GroupCommitter,
        interval_ms: int = DEFAULT_COMMIT_INTERVAL_MS,
        max_events: int = DEFAULT_COMMIT_EVENTS,
        max_pending_events: int = DEFAULT_MAX_PENDING_EVENTS,
    ) -> None:
        self._committer = committer
        self._interval_s = interval_ms / 1000
        self._max_events = max_events
        self._max_pending_events = max_pending_events
        self._waiting: list[_Waiting] = []
        self._committing: list[_Waiting] = []
        self._num_pending = 0
        self._group_full = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    @property
    def num_pending(self) -> int:
        """Events that were accepted and not yet committed."""
        return self._num_pending

    async def append(self, events: EventBatch) -> list[bool]:
        """Return once ``events`` are durable, saying which were appended (else duplicates)."""
        check_events(events)
        if not len(events):
            return []
        if self._num_pending and self._num_pending + len(events) > self._max_pending_events:
            raise LogBackpressureError(
                f"{self._num_pending} events wait for a commit, at most "
                f"{self._max_pending_events} may; try again later"
            )
        waiting = _Waiting(events, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._num_pending += len(events)
        if self._num_waiting() >= self._max_events:
            self._group_full.set()
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._commit_groups())
        return await waiting.outcome

    async def flush(self) -> None:
        """Return when everything accepted so far is committed or refused."""
        accepted = [waiting.outcome for waiting in [*self._committing, *self._waiting]]
        if accepted:
            self._group_full.set()
            await asyncio.wait(accepted)

    async def _commit_groups(self) -> None:
        while self._waiting:
            if self._num_waiting() < self._max_events:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._group_full.wait(), self._interval_s)
            self._group_full.clear()
            self._committing, self._waiting = self._waiting, []
            await self._commit(self._committing)
            self._committing = []

    async def _commit(self, group: list[_Waiting]) -> None:
        try:
            outcomes = await asyncio.to_thread(
                self._committer.commit, [waiting.events for waiting in group]
            )
        except Exception as error:  # whatever it was, the callers must hear of it
            for waiting in group:
                if not waiting.outcome.done():
                    waiting.outcome.set_exception(error)
        else:
            for waiting, outcome in zip(group, outcomes, strict=True):
                if not waiting.outcome.done():  # a caller that gave up cancelled its future
                    waiting.outcome.set_result(outcome)
        finally:
            self._num_pending -= sum(len(waiting.events) for waiting in group)

    def _num_waiting(self) -> int:
        return sum(len(waiting.events) for waiting in self._waiting)


def _newest_first(log: EventLog) -> Iterator[EventBatch]:
    for number in reversed(log.segments()[-MAX_RELOADED_SEGMENTS:]):
        for path in reversed(log.files_of(number)):
            file = log.footer(path)
            if file is None:
                continue
            rows = log.rows(file, np.zeros_like(file.bucket_rows))
            if rows is not None:
                events = rows.readable()
                yield events.take(np.argsort(events.timestamp_ms, kind="stable"))
