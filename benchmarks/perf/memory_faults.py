"""What faults cost the memory: kills under load, and a count of what was lost, wrong or refused.

    python -m benchmarks.perf.memory_faults --output benchmarks/results/memory_faults.json

A real Ray cluster of three nodes on one machine, with a real Redis. Two writers append and
recompute rows whose every byte follows from the user, the row and its step, and note what was
acknowledged; readers on the nodes check all they read against it. First a pool with one replica of
each shard, whose processes, readers and Redis are killed; then one that grows and shrinks under
load and loses a shard's process on the way; then one with two replicas, which also loses nodes with
their files. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.perf.faults.cluster import HEALTH_CHECKS, RunningNodes, running_nodes
from benchmarks.perf.faults.kills import (
    RECOVERED_HIT_RATE,
    Killed,
    kill_node,
    kill_redis,
    kill_shard,
    kill_while_buckets_move,
)
from benchmarks.perf.faults.phase import Phase, PhaseReport, PhaseSettings
from benchmarks.perf.figures import machine, write_result
from benchmarks.perf.redis_process import RedisProcess, redis_process
from cache_actors.home import Home
from cache_actors.pool.config import PoolConfig
from cache_actors.pool.lifecycle import start_pool

_WORKER_NODES = 2


@dataclass(frozen=True)
class Settings:
    """Every phase."""

    restarts: PhaseSettings = field(
        default_factory=lambda: PhaseSettings({"shard": 12, "redis": 3, "reader": 2}, 3, 1)
    )
    moves: PhaseSettings = field(default_factory=lambda: PhaseSettings({"move": 2}, 2, 1))
    losses: PhaseSettings = field(
        default_factory=lambda: PhaseSettings({"shard": 4, "node": 3}, 3, 2)
    )

    @staticmethod
    def quick() -> Settings:
        """One fault of each kind."""
        return Settings(
            PhaseSettings({"shard": 1, "redis": 1, "reader": 1}, 3, 1),
            PhaseSettings({"move": 1}, 2, 1),
            PhaseSettings({"shard": 1, "node": 1}, 3, 2),
        )

    def seeded(self, seed: int) -> Settings:
        """The same with another seed."""
        return Settings(
            replace(self.restarts, seed=seed),
            replace(self.moves, seed=seed),
            replace(self.losses, seed=seed),
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Kill, count, print, and write the result where that was asked for."""
    options = parse_options(argv)
    settings = (Settings.quick() if options.quick else Settings()).seeded(options.seed)
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory(dir=options.scratch, prefix="marm-faults-") as scratch,
        redis_process() as redis,
        running_nodes(_WORKER_NODES) as nodes,
    ):
        phases = [
            process_restarts(settings.restarts, nodes, redis, Path(scratch)),
            moving_buckets(settings.moves, nodes, Path(scratch)),
            node_losses(settings.losses, nodes, Path(scratch)),
        ]
    write_result(json_line(settings, phases, time.monotonic() - started), options.output)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=None, help="file for the result, as JSON")
    parser.add_argument("--scratch", default=None, help="directory for stores, on a local disk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one fault of each kind")
    return parser.parse_args(argv)


def process_restarts(
    settings: PhaseSettings, nodes: RunningNodes, redis: RedisProcess, scratch: Path
) -> PhaseReport:
    """One replica of each shard, and Redis behind it: both are killed again and again."""
    config = PoolConfig(
        num_shards=settings.num_shards, redis_url=redis.tcp_url, local_dir=scratch / "disks"
    )
    pool = start_pool(Home(scratch / "restarts"), config=config)
    reading_nodes = [nodes.head_id, *nodes.worker_ids()]
    phase = Phase("restarts", settings, nodes, pool, scratch, reading_nodes)
    return phase.run(
        {
            "shard": lambda: kill_shard(pool, phase.rng),
            "redis": lambda: kill_redis(redis.server, phase.rng),
            "reader": phase.kill_reader,
        }
    )


def moving_buckets(settings: PhaseSettings, nodes: RunningNodes, scratch: Path) -> PhaseReport:
    """The pool grows and shrinks under load, and each time a shard is killed on the way."""
    config = PoolConfig(num_shards=settings.num_shards, local_dir=scratch / "disks")
    pool = start_pool(Home(scratch / "moves"), config=config)
    phase = Phase("moves", settings, nodes, pool, scratch, [nodes.head_id, *nodes.worker_ids()])
    wanted = cycle((settings.num_shards + 2, settings.num_shards))
    return phase.run(
        {
            "move": lambda: kill_while_buckets_move(
                pool, next(wanted), phase.client, phase.ledger, phase.rng
            )
        }
    )


def node_losses(settings: PhaseSettings, nodes: RunningNodes, scratch: Path) -> PhaseReport:
    """Two replicas of each shard and no Redis: processes are killed, and whole nodes."""
    config = PoolConfig(
        num_shards=settings.num_shards, replicas=settings.replicas, local_dir=scratch / "disks"
    )
    pool = start_pool(Home(scratch / "losses"), config=config)
    phase = Phase("losses", settings, nodes, pool, scratch, [nodes.head_id, nodes.head_id])
    return phase.run(
        {
            "shard": lambda: kill_shard(pool, phase.rng),
            "node": lambda: kill_node(nodes, pool, phase.client, phase.ledger, phase.rng),
        }
    )


def json_line(settings: Settings, phases: list[PhaseReport], elapsed_s: float) -> str:
    """The counts that must be zero, then everything behind them."""
    killed = [fault for phase in phases for fault in phase.killed]
    content: dict[str, Any] = {
        "benchmark": "memory_faults",
        "kills": len(killed),
        "kills_by_kind": dict(Counter(fault.kind for fault in killed)),
        "acknowledged_rows": sum(phase.acknowledged_rows for phase in phases),
        "lost_acknowledged_rows": sum(phase.lost_acknowledged_rows for phase in phases),
        "rows_missing_in_replicas": sum(phase.rows_missing_in_replicas for phase in phases),
        "wrong_rows": sum(phase.wrong_rows for phase in phases),
        "moved_replicas": sum(fault.moved_replicas for fault in killed),
        "local_reads": sum(phase.local.reads for phase in phases),
        "failed_local_reads": sum(phase.local.failed_reads for phase in phases),
        "rows_missing_from_local_reads": sum(phase.local.missing_rows for phase in phases),
        "lowest_hit_rate_while_buckets_move": min(
            (fault.lowest_hit_rate for fault in killed if fault.lowest_hit_rate is not None),
            default=None,
        ),
        "hit_rate_after_over_before": min(
            (_recovery(fault) for fault in killed if fault.kind == "node"), default=None
        ),
    }
    content["all_hold"] = (
        content["lost_acknowledged_rows"] == 0
        and content["rows_missing_in_replicas"] == 0
        and content["wrong_rows"] == 0
        and content["failed_local_reads"] == 0
        and all(phase.given_up is None for phase in phases)
        and (content["hit_rate_after_over_before"] or 0.0) >= RECOVERED_HIT_RATE
    )
    content["phases"] = [phase.as_json() for phase in phases]
    content["settings"] = asdict(settings) | {"health_checks": HEALTH_CHECKS}
    content["machine"] = machine()
    content["elapsed_s"] = round(elapsed_s, 1)
    return json.dumps(content)


def _recovery(fault: Killed) -> float:
    return (fault.hit_rate_after or 0.0) / (fault.hit_rate_before or 1.0)


if __name__ == "__main__":
    main()
