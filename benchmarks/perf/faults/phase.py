"""One pool under load and faults: start the load, kill, stop, and count what was lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks.perf.faults.actors import ReadingProcess, WritingProcess, start_on
from benchmarks.perf.faults.audit import audit_client, audit_replica
from benchmarks.perf.faults.cluster import FaultError, RunningNodes, await_value, await_whole
from benchmarks.perf.faults.kills import Kill, Killed
from benchmarks.perf.faults.ledger import Comparison, Ledger
from benchmarks.perf.faults.load import LoadSettings, ReaderReport, WriterReport
from cache_actors.pool.client import MemoryClient
from cache_actors.pool.errors import MemoryUnavailable
from cache_actors.pool.lifecycle import describe_pool, stop_pool
from cache_actors.pool.shard_link import PoolInfo
from marm.memory import Namespace

_PAUSE_BETWEEN_FAULTS_S = (0.5, 2.0)
_REPORT_TIMEOUT_S = 200.0
_FIRST_ROWS = 2_000


@dataclass(frozen=True)
class PhaseSettings:
    """One phase: how many faults of each kind, and how much load."""

    faults: Mapping[str, int]
    num_shards: int
    replicas: int
    depth: int = 2
    dim: int = 32
    num_users: int = 400
    rows_per_user: int = 4096
    num_writers: int = 2
    seed: int = 0

    @property
    def namespace(self) -> Namespace:
        """Where the rows are."""
        return Namespace(depth=self.depth, dim=self.dim)


@dataclass
class PhaseReport:
    """What a phase found.

    Attributes:
        given_up: after which fault the pool did not become whole again, if it did not.
        lost_acknowledged_rows: those that a client cannot read in the end.
        rows_missing_in_replicas: those that the files of a replica lack, where there are two.
    """

    name: str
    given_up: str | None = None
    killed: list[Killed] = field(default_factory=list)
    acknowledged_rows: int = 0
    lost_acknowledged_rows: int = 0
    rows_missing_in_replicas: int = 0
    wrong_rows: int = 0
    local: ReaderReport = field(default_factory=ReaderReport)
    remote: ReaderReport = field(default_factory=ReaderReport)
    writers: list[WriterReport] = field(default_factory=list)
    elapsed_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """All of it, for the result."""
        return asdict(self)


class Phase:
    """The load on one pool. Readers run on ``reading_nodes``, writers on the head node."""

    def __init__(
        self,
        name: str,
        settings: PhaseSettings,
        nodes: RunningNodes,
        pool: PoolInfo,
        scratch: Path,
        reading_nodes: Sequence[str],
    ) -> None:
        path = scratch / f"{name}.ledger"
        self.ledger = Ledger.create(path, settings.num_users, settings.rows_per_user)
        self.client = MemoryClient(pool, settings.namespace)
        self.rng = np.random.default_rng(settings.seed)
        self.pool = pool
        self._settings = settings
        self._report = PhaseReport(name)
        self._load = LoadSettings(
            settings.namespace, path, settings.num_users, settings.rows_per_user
        )
        self._nodes = nodes
        self._reading_nodes = list(reading_nodes)
        self._readers: list[Any] = []

    def run(self, kills: Mapping[str, Kill]) -> PhaseReport:
        """Every fault in random order, then the audit; the pool is stopped at the end."""
        started = time.monotonic()
        writers = self._start_load()
        order = [kind for kind, count in self._settings.faults.items() for _ in range(count)]
        for kind in self.rng.permutation(order).tolist():
            time.sleep(self.rng.uniform(*_PAUSE_BETWEEN_FAULTS_S))
            try:
                killed = kills[kind]()
            except (FaultError, MemoryUnavailable) as error:
                self._report.given_up = f"after {kind} was killed: {error}"
                break
            self._report.killed.append(killed)
            ray.get(
                [actor.look_again.remote() for actor in self._readers], timeout=_REPORT_TIMEOUT_S
            )
            print(f"{killed.kind}: {killed.target}, recovered in {killed.recovered_s:.1f} s")
        self._stop_load(writers)
        self._report.acknowledged_rows = self.ledger.num_rows
        try:
            self._audit()
            self.client.close()
            stop_pool(self.pool)
        except (FaultError, MemoryUnavailable) as error:
            self._report.given_up = self._report.given_up or f"at the end: {error}"
        self._report.elapsed_s = time.monotonic() - started
        return self._report

    def kill_reader(self) -> Killed:
        """SIGKILL to a random reader inside a read; another one starts on its node."""
        started = time.monotonic()
        victim = int(self.rng.integers(len(self._readers)))
        actor = self._readers[victim]
        self._count_reads(ray.get(actor.report.remote(), timeout=_REPORT_TIMEOUT_S))
        os.kill(ray.get(actor.pid.remote(), timeout=_REPORT_TIMEOUT_S), signal.SIGKILL)
        self._readers[victim] = self._start_reader(victim)
        ray.get(self._readers[victim].pid.remote(), timeout=_REPORT_TIMEOUT_S)
        return Killed("reader", f"reader {victim}", time.monotonic() - started)

    def _start_load(self) -> list[Any]:
        settings = self._settings
        writers = [
            start_on(
                self._nodes.head_id,
                WritingProcess,
                *(self.pool, self._load, writer, settings.num_writers, settings.seed),
            )
            for writer in range(settings.num_writers)
        ]
        await_value(lambda: self.ledger.num_rows >= _FIRST_ROWS or None, "the writers have begun")
        self._readers = [self._start_reader(index) for index in range(len(self._reading_nodes))]
        ray.get([actor.pid.remote() for actor in self._readers], timeout=_REPORT_TIMEOUT_S)
        return writers

    def _start_reader(self, index: int) -> Any:
        seed = int(self.rng.integers(1 << 30))
        return start_on(self._reading_nodes[index], ReadingProcess, self.pool, self._load, seed)

    def _stop_load(self, writers: list[Any]) -> None:
        for actor in self._readers:
            self._count_reads(ray.get(actor.stop.remote(), timeout=_REPORT_TIMEOUT_S))
        stopped = [writer.stop.remote() for writer in writers]
        self._report.writers = ray.get(stopped, timeout=_REPORT_TIMEOUT_S)
        for actor in (*writers, *self._readers):
            ray.kill(actor)

    def _count_reads(self, counted: tuple[ReaderReport, ReaderReport]) -> None:
        local, remote = counted
        self._report.local += local
        self._report.remote += remote

    def _audit(self) -> None:
        report, namespace = self._report, self._settings.namespace
        report.lost_acknowledged_rows = report.acknowledged_rows  # unless they can be read
        infos = describe_pool(self.pool) if report.given_up else await_whole(self.pool)
        by_client = audit_client(self.client, self.ledger)
        by_replica: list[Comparison] = []
        if self._settings.replicas > 1:
            by_replica = [audit_replica(self.pool, namespace, i, self.ledger) for i in infos]
        report.lost_acknowledged_rows = by_client.missing_rows
        report.rows_missing_in_replicas = sum(audit.missing_rows for audit in by_replica)
        report.wrong_rows = sum(audit.wrong_rows for audit in (by_client, *by_replica))
        report.wrong_rows += report.local.wrong_rows + report.remote.wrong_rows
