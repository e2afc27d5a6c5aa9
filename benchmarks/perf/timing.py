"""Timing things against each other: in turn, round after round, so that all share the weather."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]
"""Times of one case, ``[rounds, repeats]``."""


@dataclass(frozen=True)
class Case:
    """Something to time: ``run`` is timed, ``draw`` makes its argument and is not."""

    draw: Callable[[], Any]
    run: Callable[[Any], object]


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians over all rounds, and the quartiles of the same ratio round by round."""

    value: float
    lower_quartile: float
    upper_quartile: float


def time_in_turn(
    cases: Mapping[str, Case],
    rounds: int,
    repeats: int,
    warmup_rounds: int = 1,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Seconds]:
    """Every case ``repeats`` times in each round, one case after the other, by ``clock_ns``.

    The collector of reference cycles is off meanwhile, as in `timeit`.
    """
    seconds: dict[str, Seconds] = {name: np.zeros((rounds, repeats)) for name in cases}
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for turn in range(-warmup_rounds, rounds):
            for name, case in cases.items():
                arguments = [case.draw() for _ in range(repeats)]
                elapsed_ns = [_elapsed_ns(case.run, argument, clock_ns) for argument in arguments]
                if turn >= 0:
                    seconds[name][turn] = np.array(elapsed_ns) / 1e9
    finally:
        if was_enabled:
            gc.enable()
    return seconds


def ratio_of_medians(numerator: Seconds, denominator: Seconds) -> Ratio:
    """How much longer ``numerator`` takes than ``denominator``."""
    by_round = np.median(numerator, axis=1) / np.median(denominator, axis=1)
    return spread(float(np.median(numerator) / np.median(denominator)), by_round)


def spread(value: float, by_round: NDArray[np.float64]) -> Ratio:
    """``value`` with the quartiles of what each round gave."""
    lower, upper = np.quantile(by_round, [0.25, 0.75])
    return Ratio(value, float(lower), float(upper))


def _elapsed_ns(run: Callable[[Any], object], argument: Any, clock_ns: Callable[[], int]) -> int:
    started = clock_ns()
    run(argument)
    return clock_ns() - started
