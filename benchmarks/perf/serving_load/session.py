"""All parts of the serving benchmark, in a process whose environment is already the one asked for.

Started by `benchmarks.perf.serving`: Ray and Serve read their variables when they are imported.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from benchmarks.perf.figures import Measured, json_line, print_table, write_result
from benchmarks.perf.rank_compute import RankComputeSettings, measure_rank_compute
from benchmarks.perf.redis_process import RedisProcess, redis_process
from benchmarks.perf.serving_load.client_process import LoadClient, client_process
from benchmarks.perf.serving_load.faults import FaultSettings, measure_faults
from benchmarks.perf.serving_load.http_load import Target
from benchmarks.perf.serving_load.options import parse_options
from benchmarks.perf.serving_load.overload import OverloadSettings, measure_overload
from benchmarks.perf.serving_load.result import nested
from benchmarks.perf.serving_load.service import (
    RunningService,
    ServiceSettings,
    running_service,
)
from benchmarks.perf.serving_load.swap import SwapSettings, measure_swap
from benchmarks.perf.serving_load.whole_request import (
    WholeRequestSettings,
    measure_latency,
    measure_throughput,
)
from benchmarks.perf.serving_load.world import WorldSettings
from cache_actors.home import Home


@dataclass(frozen=True)
class Settings:
    """Sizes of every part."""

    compute: RankComputeSettings = field(default_factory=RankComputeSettings)
    world: WorldSettings = field(default_factory=WorldSettings)
    service: ServiceSettings = field(default_factory=ServiceSettings)
    whole_request: WholeRequestSettings = field(default_factory=WholeRequestSettings)
    overload: OverloadSettings = field(default_factory=OverloadSettings)
    swap: SwapSettings = field(default_factory=SwapSettings)
    faults: FaultSettings = field(default_factory=FaultSettings)

    @staticmethod
    def quick() -> Settings:
        """Sizes that show that everything runs; their figures mean nothing."""
        return Settings(
            compute=RankComputeSettings.quick(),
            world=WorldSettings(
                depth=1,
                dim=32,
                ranking_history=64,
                cascading_history=16,
                retrieval_history=32,
                num_items=500,
                num_users=4,
                found=100,
                kept=40,
            ),
            whole_request=WholeRequestSettings(
                rounds=2, requests_per_round=3, seconds_per_round=0.5, loaded_rounds=1
            ),
            overload=OverloadSettings(seconds=2.0, concurrency=4, peak_seconds=1.0),
            swap=SwapSettings(swaps=1, seconds_before=1.0, seconds_after=0.5),
            faults=FaultSettings(seconds_between=0.5),
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the result where that was asked for."""
    options = parse_options(__doc__.splitlines()[0], argv)
    settings = Settings.quick() if options.quick else Settings()
    if options.overload_s is not None:
        settings = replace(
            settings, overload=replace(settings.overload, seconds=options.overload_s)
        )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(
        dir=options.scratch, prefix="marm-perf-", ignore_cleanup_errors=True
    ) as scratch:
        measured = measure(settings, options.parts, Path(scratch))
    title = f"serving, {options.env} environment"
    print_table(title, measured)
    described = {"env": options.env, **asdict(settings)}
    line = json_line("serving", measured, described, time.monotonic() - started)
    write_result(nested(line), options.output)


def measure(settings: Settings, parts: Sequence[str], scratch: Path) -> list[Measured]:
    """The chosen parts, one after the other. Ray runs only for those that need a service."""
    measured: list[Measured] = []
    if "compute" in parts:
        measured.extend(measure_rank_compute(settings.compute))
    if set(parts) - {"compute"}:
        world = settings.world
        with (
            redis_process() as redis,
            running_service(
                Home(scratch / "home"), world, settings.service, redis.tcp_url
            ) as service,
            client_process(
                Target(f"{service.url}/recommend", tuple(world.users().tolist()), world.shown)
            ) as client,
        ):
            measured.extend(measure_service(settings, parts, service, redis, client))
    return measured


def measure_service(
    settings: Settings,
    parts: Sequence[str],
    service: RunningService,
    redis: RedisProcess,
    client: LoadClient,
) -> list[Measured]:
    """The parts that need a service; those that hurt it come last."""
    whole = settings.whole_request
    measures: dict[str, list[Callable[[], Measured]]] = {
        "request": [
            lambda: measure_latency(whole, settings.world, service, client),
            lambda: measure_throughput(whole, settings.world, service, client),
        ],
        "overload": [lambda: measure_overload(settings.overload, service, client)],
        "swap": [lambda: measure_swap(settings.swap, settings.world, service, client)],
        "faults": [lambda: measure_faults(settings.faults, service, redis.server, client)],
    }
    measured = []
    for part, runs in measures.items():
        for run in runs if part in parts else []:
            measured.append(run())
            print_table(f"{part}, so far", measured[-1:])
    return measured


if __name__ == "__main__":
    main()
