"""The lift of an arm over the control, with users as clusters: the delta method.

All requests and items of a user hang together, so the user is the unit that was randomised and the
unit of every variance here (Deng, Knoblich, Lu: Applying the Delta Method in Metric Analytics, KDD
2018, section 2.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

_CLEARLY_NONZERO = 3.0
"""Standard errors between the control's mean and 0 below which a relative lift says nothing."""


@dataclass(frozen=True)
class UserSums:
    """One metric in one arm, as ``U`` users: what is counted, and per how many.

    The metric is the ratio of the sums. A mean per user has a denominator of ones.
    """

    numerator: NDArray[np.float64]  # [U]
    denominator: NDArray[np.float64]  # [U]

    def __post_init__(self) -> None:
        shape = np.shape(self.numerator)
        if len(shape) != 1 or np.shape(self.denominator) != shape:
            raise ValueError(
                "numerator and denominator must be two columns of one length, got shapes "
                f"{shape} and {np.shape(self.denominator)}"
            )
        if shape[0] < 2:
            raise ValueError(f"an arm needs at least 2 users, got {shape[0]}")
        if not (np.isfinite(self.numerator).all() and np.isfinite(self.denominator).all()):
            raise ValueError("sums per user must be finite; leave users without a value out")
        if not self.denominator.sum() > 0:
            raise ValueError("the denominators of an arm must sum to more than 0")

    def __len__(self) -> int:
        return len(self.numerator)

    @property
    def mean(self) -> float:
        """The metric of the arm."""
        return float(self.numerator.sum() / self.denominator.sum())


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval; NaN where the data can't tell."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


UNKNOWN = Estimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Lift:
    """An arm against the control in one metric."""

    control: float
    arm: float
    absolute: Estimate  # arm - control
    relative: Estimate  # arm / control - 1; NaN when the control's mean may be 0
    standard_error: float  # of the absolute lift
    p_value: float  # two-sided, of no difference; not adjusted for other comparisons


class LiftMethod(Protocol):
    """A way to get intervals."""

    @property
    def confidence(self) -> float:
        """Coverage of the intervals, such as 0.95."""
        ...

    def compare(self, control: UserSums, arm: UserSums) -> Lift:
        """The lift of ``arm`` over ``control``; their users are disjoint."""
        ...


@dataclass(frozen=True)
class DeltaMethod:
    """Intervals from the linearised ratio and Welch's t."""

    confidence: float = 0.95

    def __post_init__(self) -> None:
        check_confidence(self.confidence)

    def compare(self, control: UserSums, arm: UserSums) -> Lift:
        """See `LiftMethod.compare`."""
        variances = ratio_variance(control), ratio_variance(arm)
        return welch_lift(
            (control.mean, arm.mean), variances, (len(control), len(arm)), self.confidence
        )


def linearised(sums: UserSums) -> NDArray[np.float64]:
    """Each user's pull on the ratio, ``[U]``: mean 0, and the variance of the ratio is that of
    their mean."""
    deviation = sums.numerator - sums.mean * sums.denominator
    return deviation / sums.denominator.mean()


def ratio_variance(sums: UserSums) -> float:
    """Variance of a ratio of sums over independent users."""
    return float(np.var(linearised(sums), ddof=1) / len(sums))


def welch_lift(
    means: tuple[float, float],
    variances: tuple[float, float],
    users: tuple[int, int],
    confidence: float,
) -> Lift:
    """The lift of (control, arm) from the means, the variances of the means, and users."""
    control, arm = means
    variance = variances[0] + variances[1]
    error = math.sqrt(variance)
    degrees = welch_degrees(variances, users)
    critical = float(stdtrit(degrees, 0.5 + confidence / 2))
    difference = arm - control
    if error > 0:
        p_value = 2 * float(stdtr(degrees, -abs(difference) / error))
    else:
        p_value = 1.0 if difference == 0 else 0.0
    return Lift(
        control=control,
        arm=arm,
        absolute=around(difference, critical * error),
        relative=_relative(means, variances, critical),
        standard_error=error,
        p_value=p_value,
    )


def around(value: float, margin: float) -> Estimate:
    """A symmetric interval."""
    return Estimate(value, value - margin, value + margin)


def is_clearly_nonzero(mean: float, standard_error: float) -> bool:
    """Whether it makes sense to divide by ``mean``."""
    return mean != 0 and abs(mean) > _CLEARLY_NONZERO * standard_error


def welch_degrees(variances: tuple[float, float], users: tuple[int, int]) -> float:
    """Degrees of freedom of Welch's t (Welch-Satterthwaite)."""
    spread = sum(v * v / (n - 1) for v, n in zip(variances, users, strict=True))
    return sum(variances) ** 2 / spread if spread > 0 else float(sum(users) - 2)


def check_confidence(confidence: float) -> None:
    """Refuse what is not a level of confidence."""
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must be from 0.5 to below 1, such as 0.95, got {confidence}")


def _relative(
    means: tuple[float, float], variances: tuple[float, float], critical: float
) -> Estimate:
    control, arm = means
    if not is_clearly_nonzero(control, math.sqrt(variances[0])):
        return UNKNOWN
    variance = variances[1] / control**2 + arm**2 * variances[0] / control**4
    return around(arm / control - 1.0, critical * math.sqrt(variance))
