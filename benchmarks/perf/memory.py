"""What the memory costs: reads, writes and bytes, against memcpy, numpy and a real Redis.

    python -m benchmarks.perf.memory --output benchmarks/results/memory.json

Starts redis-server and a Ray of its own, takes about three minutes, prints a table and then one
JSON line. Whatever is compared takes turns, round by round; ratios are of medians over all rounds.
A missed target is printed, not raised: this measures, it does not judge.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import ray

from benchmarks.perf.batch_reads import BatchReadSettings, measure_batch_reads
from benchmarks.perf.figures import Measured, json_line, print_table, write_result
from benchmarks.perf.pool_writes import PoolWriteSettings, measure_pool_writes
from benchmarks.perf.redis_process import redis_process
from benchmarks.perf.row_growth import RowGrowthSettings, measure_row_growth
from benchmarks.perf.store_process import store_process
from benchmarks.perf.user_growth import UserGrowthSettings, measure_user_growth
from benchmarks.perf.user_reads import UserReadSettings, measure_user_reads

_RAY_CPUS = 4
_OBJECT_STORE_BYTES = 512 << 20


@dataclass(frozen=True)
class Settings:
    """Sizes of every part."""

    user_reads: UserReadSettings = field(default_factory=UserReadSettings)
    batch_reads: BatchReadSettings = field(default_factory=BatchReadSettings)
    row_growth: RowGrowthSettings = field(default_factory=RowGrowthSettings)
    user_growth: UserGrowthSettings = field(default_factory=UserGrowthSettings)
    pool_writes: PoolWriteSettings = field(default_factory=PoolWriteSettings)

    @staticmethod
    def quick() -> Settings:
        """Sizes that show that everything runs; their figures mean nothing."""
        return Settings(
            UserReadSettings(num_users=16, rounds=2, reads_per_round=20),
            BatchReadSettings(num_users=512, rounds=2, reads_per_round=5),
            RowGrowthSettings(num_users=2, rounds=2, reads_per_round=5),
            UserGrowthSettings(many_users=2_000, rounds=2, reads_per_round=20),
            PoolWriteSettings(num_users=500, saves_per_round=10, rounds=2),
        )

    def seeded(self, seed: int) -> Settings:
        """The same sizes with another seed everywhere."""
        return Settings(
            replace(self.user_reads, seed=seed),
            replace(self.batch_reads, seed=seed),
            replace(self.row_growth, seed=seed),
            replace(self.user_growth, seed=seed),
            replace(self.pool_writes, seed=seed),
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the result where that was asked for."""
    options = parse_options(argv)
    settings = (Settings.quick() if options.quick else Settings()).seeded(options.seed)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="marm-perf-") as scratch:
        measured = measure(settings, Path(scratch))
    print_table("memory", measured)
    line = json_line("memory", measured, asdict(settings), time.monotonic() - started)
    write_result(line, options.output)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=None, help="file for the result, as JSON")
    parser.add_argument("--scratch", default=None, help="directory for stores, on a local disk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="try that it runs; no real figures")
    return parser.parse_args(argv)


def measure(settings: Settings, scratch: Path) -> list[Measured]:
    """All parts. Ray runs only for the last, so that its processes disturb no other."""
    with redis_process() as redis:
        with store_process() as writer:
            measured = [
                *measure_user_reads(settings.user_reads, writer, redis, scratch / "user-reads"),
                measure_batch_reads(settings.batch_reads, writer, scratch / "batch-reads"),
                measure_row_growth(settings.row_growth, writer, scratch / "row-growth"),
                measure_user_growth(settings.user_growth, writer, scratch / "user-growth"),
            ]
        with own_ray():
            measured.append(
                measure_pool_writes(settings.pool_writes, redis.tcp_url, scratch / "home")
            )
    return measured


@contextmanager
def own_ray() -> Iterator[None]:
    """A Ray of one node that ends with the block."""
    ray.init(
        address="local",
        num_cpus=_RAY_CPUS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        object_store_memory=_OBJECT_STORE_BYTES,
    )
    try:
        yield
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
