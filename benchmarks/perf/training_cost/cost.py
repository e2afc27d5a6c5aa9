"""Time per event of a training step: MARM against HSTU*, against L = 0, and over n.

A step is what a `StreamTrainer` does with a batch whose rows were fetched: building inputs,
predicting and learning. All methods take turns in one process, with one thread, and time is that
thread's CPU time: what a clock shows where the thread has a core to itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.perf.figures import Figure, Measured, at_most
from benchmarks.perf.timing import Case, Seconds, ratio_of_medians, spread, time_in_turn
from benchmarks.perf.training_cost.synthetic_users import BatchShape, MethodCase, RepeatedStep
from marm.config import InterestConfig

_OVER_HSTU, _OVER_DIN, _EXPONENT = 0.2, 5.0, 1.1


@dataclass(frozen=True)
class CostSettings:
    """Sizes of the measurement; ``batch`` has one event of each user, which shares nothing."""

    batch: BatchShape = field(default_factory=BatchShape)
    history_length: int = 1_000
    depth: int = 4  # L of MARM, and blocks of HSTU*
    shared_events_per_user: int = 4
    growth_lengths: tuple[int, ...] = (250, 500, 1_000, 2_000)
    rounds: int = 5
    repeats: int = 1
    seed: int = 0

    @staticmethod
    def quick() -> CostSettings:
        """Sizes that show that everything runs; their figures mean nothing."""
        return CostSettings(
            BatchShape(num_users=4, dim=16), 20, 2, 2, growth_lengths=(10, 20), rounds=2
        )


def measure_cost(settings: CostSettings) -> list[Measured]:
    """All figures; torch's number of threads is put back after."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_measure_methods(settings), _measure_growth(settings)]
    finally:
        torch.set_num_threads(threads)


def _measure_methods(settings: CostSettings) -> Measured:
    n, depth, alone = settings.history_length, settings.depth, settings.batch
    shared = BatchShape(
        max(1, alone.num_users // settings.shared_events_per_user),
        settings.shared_events_per_user,
        alone.dim,
        alone.num_heads,
        alone.num_items,
        alone.num_tags,
    )
    methods = {
        "marm": MethodCase(n, depth),
        "layer_0": MethodCase(n),
        "din": MethodCase(n, interest=InterestConfig(method="din")),
        "hstu": MethodCase(n, interest=InterestConfig(method="hstu", layers=depth)),
    }
    cases: dict[str, Case] = {}
    for suffix, shape in (("", alone), ("_shared", shared)):
        for name, method in methods.items():
            cases[name + suffix] = _case(RepeatedStep(shape, method, settings.seed))
    marm = RepeatedStep(alone, methods["marm"], settings.seed)
    cases["marm_inputs"] = Case(lambda: None, lambda _: marm.build())
    seconds = _cpu_seconds(settings, cases)
    per_event = {
        name: taken / (shared if name.endswith("_shared") else alone).num_events
        for name, taken in seconds.items()
    }
    return Measured(
        tuple(_method_figures(settings, per_event)),
        {
            f"{name}_us_per_event": 1e6 * float(np.median(taken))
            for name, taken in per_event.items()
        },
    )


def _method_figures(settings: CostSettings, per_event: Mapping[str, Seconds]) -> list[Figure]:
    n, depth = settings.history_length, settings.depth
    marm = f"time per event of MARM (L={depth}, n={n})"
    together = f"the same with {settings.shared_events_per_user} events of each user in a batch"
    return [
        Figure(
            "cost_over_hstu",
            f"{marm} over HSTU* of {depth} blocks; one event of each user in a batch",
            ratio_of_medians(per_event["marm"], per_event["hstu"]),
            at_most(_OVER_HSTU),
        ),
        Figure(
            "cost_over_hstu_shared",
            together,
            ratio_of_medians(per_event["marm_shared"], per_event["hstu_shared"]),
            at_most(_OVER_HSTU),
        ),
        Figure(
            "cost_over_din",
            f"{marm} over a single target attention (L=0)",
            ratio_of_medians(per_event["marm"], per_event["layer_0"]),
            at_most(_OVER_DIN),
        ),
        Figure(
            "cost_over_din_shared",
            together,
            ratio_of_medians(per_event["marm_shared"], per_event["layer_0_shared"]),
            at_most(_OVER_DIN),
        ),
        Figure(
            "cost_over_din_unit",
            f"{marm} over DIN with its activation unit, which is quadratic in d",
            ratio_of_medians(per_event["marm"], per_event["din"]),
        ),
        Figure(
            "inputs_over_step",
            f"building the inputs, which runs beside learning, over the step of {marm}",
            ratio_of_medians(per_event["marm_inputs"], per_event["marm"]),
        ),
    ]


def _measure_growth(settings: CostSettings) -> Measured:
    """The slope of log(time) over log(n)."""
    cases = {
        f"marm_{n}": _case(
            RepeatedStep(settings.batch, MethodCase(n, settings.depth), settings.seed)
        )
        for n in settings.growth_lengths
    }
    seconds = _cpu_seconds(settings, cases)
    taken = np.stack(list(seconds.values()))  # [n, rounds, repeats]
    by_round = np.array([_slope(settings, one) for one in np.median(taken, axis=2).T])
    figure = Figure(
        "cost_exponent",
        f"slope of log(time per event) over log(n), n = {settings.growth_lengths}",
        spread(_slope(settings, np.median(taken, axis=(1, 2))), by_round),
        at_most(_EXPONENT),
    )
    scale = 1e6 / settings.batch.num_events
    return Measured(
        (figure,),
        {
            f"{name}_us_per_event": scale * float(np.median(times))
            for name, times in seconds.items()
        },
    )


def _cpu_seconds(settings: CostSettings, cases: Mapping[str, Case]) -> dict[str, Seconds]:
    return time_in_turn(cases, settings.rounds, settings.repeats, clock_ns=time.process_time_ns)


def _slope(settings: CostSettings, times: NDArray[np.float64]) -> float:
    return float(np.polyfit(np.log(settings.growth_lengths), np.log(times), 1)[0])


def _case(step: RepeatedStep) -> Case:
    return Case(lambda: None, lambda _: step.run())
