"""Parts of the service are killed under load: what requests notice of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from app.args import deployment_name
from benchmarks.perf.faults.cluster import await_value
from benchmarks.perf.faults.kills import kill_redis, kill_shard
from benchmarks.perf.figures import Figure, Measured, at_most, exactly
from benchmarks.perf.redis_server import RedisServer
from benchmarks.perf.serving_load.answers import Answers
from benchmarks.perf.serving_load.client_process import LoadClient
from benchmarks.perf.serving_load.http_load import ClosedLoop
from benchmarks.perf.serving_load.processes import kill, replicas
from benchmarks.perf.serving_load.service import RunningService
from benchmarks.perf.serving_load.world import VARIANT


@dataclass(frozen=True)
class FaultSettings:
    """Sizes of the measurement."""

    concurrency: int = 4
    seconds_between: float = 4.0
    seed: int = 0


@dataclass(frozen=True)
class Fault:
    """One part that was killed: when, and when it was whole again.

    ``loses_requests``: requests that the part was working on may be lost with it.
    """

    part: str
    killed_s: float
    whole_s: float
    loses_requests: bool = False


def measure_faults(
    settings: FaultSettings, service: RunningService, redis: RedisServer, client: LoadClient
) -> Measured:
    """A shard, a ranking replica and Redis, one after the other, each after the last is whole."""
    rng = np.random.default_rng(settings.seed)
    kills: dict[str, Callable[[], object]] = {
        "shard": lambda: kill_shard(service.pool, rng),
        "replica": lambda: kill_replica(deployment_name("ranking", VARIANT)),
        "redis": lambda: kill_redis(redis, rng),
    }
    faults = []
    with client.running(ClosedLoop(settings.concurrency)) as got:
        time.sleep(settings.seconds_between)
        for part, strike in kills.items():
            killed_s = time.monotonic()
            strike()
            service.await_ready()
            whole_s = time.monotonic()
            faults.append(Fault(part, killed_s, whole_s, loses_requests=part == "replica"))
            time.sleep(settings.seconds_between)
    return describe(got[0], faults)


def kill_replica(deployment: str) -> None:
    """SIGKILL to one replica; returns when the deployment has as many as before."""
    before = {process.pid for process in replicas(deployment)}
    victim = min(before)
    kill(victim)

    def replaced() -> bool | None:
        pids = {process.pid for process in replicas(deployment)} - {victim}
        return True if len(pids) >= len(before) else None

    await_value(replaced, f"{deployment} has {len(before)} replicas again")


def describe(answers: Answers, faults: list[Fault]) -> Measured:
    """What each fault cost."""
    figures = [
        Figure(
            "faults.failed",
            "failed requests of all faults, beyond those under way on the killed replica",
            exactly(float(lost_beyond(answers, faults).sum())),
            at_most(0),
        )
    ]
    medians = {"faults.requests": float(len(answers))}
    for fault in faults:
        hit = answers.select(
            (answers.ended_s >= fault.killed_s) & (answers.began_s <= fault.whole_s)
        )
        name = f"faults.{fault.part}"
        medians |= {
            f"{name}_requests": float(len(hit)),
            f"{name}_failed": float(hit.is_failed.sum()),
            f"{name}_refused": float(hit.is_refused.sum()),
            f"{name}_degraded": float(hit.is_degraded.sum()),
            f"{name}_p99_ms": hit.latency_ms(0.99),
            f"{name}_whole_again_s": fault.whole_s - fault.killed_s,
        }
    return Measured(tuple(figures), medians)


def lost_beyond(answers: Answers, faults: list[Fault]) -> np.ndarray:
    """Which requests failed though nothing that worked on them was killed, ``[R]``."""
    lost = answers.is_failed
    for fault in faults:
        if fault.loses_requests:
            lost = lost & ~answers.under_way_at(fault.killed_s)
    return lost
