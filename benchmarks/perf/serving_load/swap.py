"""New model versions go live under load: what requests notice of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from benchmarks.perf.faults.cluster import await_value
from benchmarks.perf.figures import Figure, Measured, at_least, at_most, exactly
from benchmarks.perf.serving_load.answers import NO_VERSION, Answers
from benchmarks.perf.serving_load.client_process import LoadClient
from benchmarks.perf.serving_load.http_load import ClosedLoop
from benchmarks.perf.serving_load.service import RunningService
from benchmarks.perf.serving_load.world import VARIANT, Trained, WorldSettings, trained
from benchmarks.perf.timing import spread
from stages.request import STAGES


@dataclass(frozen=True)
class SwapSettings:
    """Sizes of the measurement."""

    concurrency: int = 4
    swaps: int = 3
    seconds_before: float = 8.0
    seconds_after: float = 4.0


@dataclass(frozen=True)
class Swap:
    """One publication: the quiet time before it, when it began, and when all replicas of all stages
    had its models, all on the monotonic clock."""

    quiet_s: float
    published_s: float
    live_s: float


def measure_swap(
    settings: SwapSettings, world: WorldSettings, service: RunningService, client: LoadClient
) -> Measured:
    """A new version of every stage at once, several times."""
    versions = [[trained(world, stage, turn) for stage in STAGES] for turn in range(settings.swaps)]
    swaps = []
    with client.running(ClosedLoop(settings.concurrency)) as got:
        for models in versions:
            quiet_s = time.monotonic()
            time.sleep(settings.seconds_before)
            published_s = time.monotonic()
            await_live(service, publish(service, models))
            time.sleep(settings.seconds_after)  # another replica may be later than the one asked
            swaps.append(Swap(quiet_s, published_s, time.monotonic()))
    return describe(got[0], swaps)


def publish(service: RunningService, models: list[Trained]) -> dict[str, int]:
    """Versions of new models by the name that the service's health has for them."""
    return {f"{model.stage}/{VARIANT}": model.publish(service.home) for model in models}


def await_live(service: RunningService, versions: dict[str, int]) -> None:
    """Return once the service says that it serves these versions."""

    def live() -> bool | None:
        stages = (service.health() or {}).get("stages", {})
        seen = {name: stages.get(name, {}).get("model_version") for name in versions}
        return True if seen == versions else None

    await_value(live, f"{versions} are live")


def describe(answers: Answers, swaps: list[Swap]) -> Measured:
    """The figures of several swaps; the p99 is that of all requests of the times together."""
    before = [answers.begun_in(swap.quiet_s, swap.published_s) for swap in swaps]
    during = [answers.begun_in(swap.published_s, swap.live_s) for swap in swaps]
    p99_before_ms = p99_of_all(before)
    p99_during_ms = p99_of_all(during)
    by_swap = np.array(
        [
            late.latency_ms(0.99) / early.latency_ms(0.99)
            for early, late in zip(before, during, strict=True)
        ]
    )
    versions = [set(late.version.tolist()) - {NO_VERSION} for late in during]
    figures = (
        Figure(
            "swap.failed",
            "requests that got no answer while versions changed",
            exactly(float(answers.is_failed.sum() + answers.is_refused.sum())),
            at_most(0),
        ),
        Figure(
            "swap.versions_seen",
            "fewest versions of the ranking model that answered during one swap",
            exactly(float(min(map(len, versions)))),
            at_least(2),
        ),
        Figure(
            "swap.p99_during_over_before",
            "p99 of requests during a swap / before it",
            spread(p99_during_ms / p99_before_ms, by_swap),
            at_most(2.0),
        ),
    )
    medians = {
        "swap.requests": float(len(answers)),
        "swap.degraded": float(answers.is_degraded.sum()),
        "swap.p99_before_ms": p99_before_ms,
        "swap.p99_during_ms": p99_during_ms,
        "swap.lasted_s": float(np.median([s.live_s - s.published_s for s in swaps])),
    }
    return Measured(figures, medians)


def p99_of_all(parts: list[Answers]) -> float:
    """p99 in milliseconds of the requests of all parts together."""
    return 1_000 * float(np.quantile(np.concatenate([part.latency_s for part in parts]), 0.99))
