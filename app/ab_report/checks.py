"""What keeps a reader from being fooled: sample ratio, many comparisons, and power."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtrc, ndtri

SAMPLE_RATIO_LEVEL = 1e-3
"""p value below which users did not come in the configured ratio. Strict, as it is looked at often
and a true mismatch is a bug that makes it far smaller."""

POWER = 0.8


@dataclass(frozen=True)
class SampleRatio:
    """Users that were seen against users that the weights promise."""

    observed: dict[str, int]
    expected: dict[str, float]
    p_value: float

    @property
    def mismatch(self) -> bool:
        """Whether the lifts must not be trusted."""
        return self.p_value < SAMPLE_RATIO_LEVEL


def sample_ratio(users: Mapping[str, int], weights: Mapping[str, float]) -> SampleRatio:
    """Chi-square test of the users of each arm against the configured ``weights``, which need not
    sum to 1. An arm that should get nobody and got somebody is a mismatch for certain."""
    unweighted = sorted(set(users) - set(weights))
    if unweighted:
        raise ValueError(
            f"weights are missing for the arms {', '.join(unweighted)}; they are given for "
            f"{', '.join(sorted(weights))}"
        )
    if not all(weight >= 0 and np.isfinite(weight) for weight in weights.values()):
        raise ValueError(f"weights must be numbers of 0 or more, got {dict(weights)}")
    total_weight, total = sum(weights.values()), sum(users.values())
    if not total_weight > 0:
        raise ValueError(f"one arm at least needs a weight above 0, got {dict(weights)}")
    observed = {arm: int(users.get(arm, 0)) for arm in weights}
    expected = {arm: total * weight / total_weight for arm, weight in weights.items()}
    if any(observed[arm] for arm in weights if not expected[arm]):
        return SampleRatio(observed, expected, 0.0)
    arms = [arm for arm in weights if expected[arm]]
    statistic = sum((observed[arm] - expected[arm]) ** 2 / expected[arm] for arm in arms)
    p_value = float(chdtrc(len(arms) - 1, statistic)) if len(arms) > 1 else 1.0
    return SampleRatio(observed, expected, p_value)


def holm(p_values: Sequence[float]) -> NDArray[np.float64]:
    """p values adjusted for there being several of them (Holm 1979), in the order given.

    The chance of any false finding among all those below a level stays at most that level.
    """
    given = np.asarray(p_values, np.float64)
    order = np.argsort(given, kind="stable")
    adjusted = np.maximum.accumulate(given[order] * np.arange(len(given), 0, -1))
    result = np.empty_like(given)
    result[order] = np.minimum(adjusted, 1.0)
    return result


def minimum_detectable(standard_error: float, confidence: float, power: float = POWER) -> float:
    """The smallest true absolute lift that an experiment of this size finds with ``power``."""
    return float(ndtri(0.5 + confidence / 2) + ndtri(power)) * standard_error
