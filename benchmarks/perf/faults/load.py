"""The mixed load under which things are killed: writers and readers that keep their own counts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.perf.faults.ledger import Ledger
from benchmarks.perf.faults.rows import make_rows
from cache_actors.pool.client import MemoryClient
from cache_actors.pool.errors import MemoryUnavailable
from cache_actors.pool.lifecycle import describe_pool
from cache_actors.pool.placement import load_placement
from cache_actors.pool.shard_link import PoolInfo
from cache_actors.store.errors import MemoryStoreError
from marm.memory import Namespace, UserRows

_ACK_TIMEOUT_S = 150.0
_PAUSE_S = 0.002  # leaves processors for whatever is being restarted
_KEPT_ERRORS = 5


@dataclass(frozen=True)
class LoadSettings:
    """Sizes of the load."""

    namespace: Namespace
    ledger: Path
    num_users: int
    rows_per_user: int
    new_rows_per_save: int = 48
    recomputed_rows_per_save: int = 16
    users_per_read: int = 32
    rows_per_read: int = 64

    def open_ledger(self) -> Ledger:
        """The ledger that all parts of the load share."""
        return Ledger(self.ledger, self.num_users, self.rows_per_user)


@dataclass
class WriterReport:
    """What a writer did."""

    saves: int = 0
    acknowledged_rows: int = 0
    failed_saves: int = 0
    longest_save_s: float = 0.0
    errors: list[str] = field(default_factory=list)


@dataclass
class ReaderReport:
    """What a reader saw. ``missing_rows`` had been acknowledged before the read began."""

    reads: int = 0
    failed_reads: int = 0
    rows: int = 0
    missing_rows: int = 0
    wrong_rows: int = 0
    longest_read_s: float = 0.0
    errors: list[str] = field(default_factory=list)

    def __add__(self, other: ReaderReport) -> ReaderReport:
        return ReaderReport(
            self.reads + other.reads,
            self.failed_reads + other.failed_reads,
            self.rows + other.rows,
            self.missing_rows + other.missing_rows,
            self.wrong_rows + other.wrong_rows,
            max(self.longest_read_s, other.longest_read_s),
            (self.errors + other.errors)[:_KEPT_ERRORS],
        )


class LoadWriter:
    """Appends rows of its users and recomputes older ones, one save after the other.

    A save that fails is repeated as it was: only an acknowledged one goes into the ledger.
    """

    def __init__(
        self, client: MemoryClient, load: LoadSettings, writer: int, num_writers: int, seed: int
    ) -> None:
        self.report = WriterReport()
        self._client = client
        self._load = load
        self._ledger = load.open_ledger()
        self._mine = np.arange(writer, load.num_users, num_writers)
        self._rng = np.random.default_rng([seed, writer])
        self._counts = np.zeros(load.num_users, np.int64)
        self._step = 0

    def write_once(self, is_stopping: Callable[[], bool]) -> None:
        """One save, repeated until it is acknowledged or there is no use in it any more."""
        users, numbers = self._choose()
        self._step += 1
        steps = np.full(len(users), self._step, np.int64)
        identifiers = self._ledger.users[users]
        rows = make_rows(self._load.namespace, identifiers, numbers, steps)
        started = time.monotonic()
        while True:
            try:
                self._client.save(identifiers, rows).wait(_ACK_TIMEOUT_S)
                break
            except (MemoryUnavailable, MemoryStoreError) as error:
                self.report.failed_saves += 1
                self.report.errors = [*self.report.errors, _dated(repr(error))][:_KEPT_ERRORS]
                if is_stopping():
                    return
        self._ledger.acknowledge(users, numbers, steps)
        np.maximum.at(self._counts, users, numbers + 1)
        self.report.saves += 1
        self.report.acknowledged_rows += len(rows)
        self.report.longest_save_s = max(self.report.longest_save_s, time.monotonic() - started)

    def _choose(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Users and row numbers: the next rows of some users, and earlier rows of others."""
        order = self._rng.permutation(self._mine)
        has_room = order[self._counts[order] < self._load.rows_per_user]
        grown = has_room[: self._load.new_rows_per_save]
        others = np.setdiff1d(order, grown)
        others = others[self._counts[others] > 0][: self._load.recomputed_rows_per_save]
        earlier = (self._rng.random(len(others)) * self._counts[others]).astype(np.int64)
        return np.concatenate([grown, others]), np.concatenate([self._counts[grown], earlier])


class LoadReader:
    """Reads batches of users of one shard at a time and checks all that comes back.

    Users of shards with a replica on this node count as local reads, all others as remote ones, and
    so does whatever is read while buckets move.
    """

    def __init__(
        self, pool: PoolInfo, client: MemoryClient, load: LoadSettings, node_id: str, seed: int
    ) -> None:
        self.local, self.remote = ReaderReport(), ReaderReport()
        self._client = client
        self._load = load
        self._ledger = load.open_ledger()
        self._rng = np.random.default_rng(seed)
        self._pool = pool
        self._node_id = node_id
        self.look_again()

    def look_again(self) -> None:
        """Find out which users are on this node; shards may have moved."""
        placement = load_placement(self._pool.placement_path)
        here = {i.shard for i in describe_pool(self._pool) if i.node_id == self._node_id}
        self._groups = [
            (share.shard in here, share.positions) for share in placement.split(self._ledger.users)
        ]
        self._version = placement.version

    def read_once(self) -> None:
        """One read of random users of a random shard."""
        is_local, members = self._groups[self._rng.integers(len(self._groups))]
        users = self._rng.choice(
            members, min(self._load.users_per_read, len(members)), replace=False
        )
        promised = self._ledger.promised(users)
        started = time.monotonic()
        found: UserRows | None = None
        problem = ""
        try:
            found = self._client.fetch(self._ledger.users[users], self._load.rows_per_read)
        except (MemoryUnavailable, MemoryStoreError) as error:
            problem = repr(error)
        elapsed_s = time.monotonic() - started
        is_local &= load_placement(self._pool.placement_path).version == self._version
        report = self.local if is_local else self.remote
        report.reads += 1
        report.longest_read_s = max(report.longest_read_s, elapsed_s)
        if found is None:
            report.failed_reads += 1
            report.errors = [*report.errors, _dated(problem)][:_KEPT_ERRORS]
            return
        compared = self._ledger.compare(
            self._load.namespace, users, promised, found, self._load.rows_per_read
        )
        if compared.missing_rows or compared.wrong_rows:
            problem = f"{compared} in {elapsed_s:.3f} s, users {users[:4].tolist()}.."
            report.errors = [*report.errors, _dated(problem)][:_KEPT_ERRORS]
        report.rows += len(found.rows)
        report.missing_rows += compared.missing_rows
        report.wrong_rows += compared.wrong_rows


def _dated(problem: str) -> str:
    """Fit to be compared with the times of the faults."""
    return f"{time.time():.1f}: {problem}"


class Loop:
    """Calls something again and again from a thread until it is stopped."""

    def __init__(self, turn: Callable[[], None], name: str) -> None:
        self._turn = turn
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> Loop:
        """Begin."""
        self._thread.start()
        return self

    def is_stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Return when the last turn is over; raises what a turn raised."""
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stop.wait(_PAUSE_S):
                self._turn()
        except BaseException as error:  # raised again by `stop`
            self._error = error
