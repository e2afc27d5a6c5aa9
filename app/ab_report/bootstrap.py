"""The lift of an arm by resampling users, for when normality is in doubt."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.ab_report.lift import (
    UNKNOWN,
    Estimate,
    Lift,
    UserSums,
    check_confidence,
    is_clearly_nonzero,
)

_CELLS = 1 << 22  # weights drawn at a time: bounds memory, changes nothing else
_WORDS = 1 << 16


@dataclass(frozen=True)
class UserBootstrap:
    """Percentile intervals from resampled users.

    Each user counts Poisson(1) times in a resample, which is the multinomial bootstrap without its
    coordination (Chamandy et al., Estimating Uncertainty for Massive Data Streams, 2012).
    """

    confidence: float = 0.95
    resamples: int = 2_000
    seed: int = 0

    def __post_init__(self) -> None:
        check_confidence(self.confidence)
        if self.resamples < 100:
            raise ValueError(f"resamples must be at least 100, got {self.resamples}")

    def compare(self, control: UserSums, arm: UserSums) -> Lift:
        """See `app.ab_report.lift.LiftMethod.compare`."""
        seeds = np.random.SeedSequence(self.seed).spawn(2)
        draws = [
            resampled_means(sums, self.resamples, np.random.default_rng(seed))
            for sums, seed in zip((control, arm), seeds, strict=True)
        ]
        differences = draws[1] - draws[0]
        relative = UNKNOWN
        if is_clearly_nonzero(control.mean, float(np.std(draws[0]))):
            relative = self._interval(arm.mean / control.mean - 1, draws[1] / draws[0] - 1)
        return Lift(
            control=control.mean,
            arm=arm.mean,
            absolute=self._interval(arm.mean - control.mean, differences),
            relative=relative,
            standard_error=float(np.std(differences, ddof=1)),
            p_value=_p_value(differences),
        )

    def _interval(self, value: float, draws: NDArray[np.float64]) -> Estimate:
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(draws, [tail, 1 - tail])
        return Estimate(value, float(low), float(high))


def resampled_means(
    sums: UserSums, resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """The metric in each resample of the users, ``[resamples]``."""
    columns = np.stack([sums.numerator, sums.denominator], axis=1)
    parts = [weights @ columns for weights in poisson_weights(len(sums), resamples, rng)]
    numerator, denominator = np.concatenate(parts).T
    # A resample without a denominator says nothing; it takes a handful of users to get one.
    usable = denominator > 0
    means = np.full(resamples, sums.mean)
    means[usable] = numerator[usable] / denominator[usable]
    return means


def poisson_weights(
    users: int, resamples: int, rng: np.random.Generator
) -> Iterator[NDArray[np.float64]]:
    """How often each user counts, ``[some resamples, users]`` at a time."""
    rows = max(1, _CELLS // users)
    table = _poisson_table()
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        yield table[rng.integers(0, _WORDS, (count, users), np.uint16)]


def _poisson_table() -> NDArray[np.float64]:
    """Poisson(1) by inverting its distribution function at every 16-bit number: a look-up is many
    times faster than drawing."""
    chance = np.array([math.exp(-1) / math.factorial(k) for k in range(10)])
    levels = (np.arange(_WORDS) + 0.5) / _WORDS
    return np.searchsorted(np.cumsum(chance), levels).astype(np.float64)


def _p_value(differences: NDArray[np.float64]) -> float:
    """Twice the smaller tail beyond zero; never 0, as the resamples are finite."""
    count = len(differences)
    tail = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (count + 1))
