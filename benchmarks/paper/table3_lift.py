"""Lifts of simulated A/B tests: users as clusters, one lift over several worlds.

Each lift is given twice. The plain one compares the arms as a production system can. The adjusted
one is CUPED (`app.ab_report.cuped`) with a covariate that only a simulation has: what the same
users did, in the same random stream, where everybody was answered by the control. No split can have
changed that, so it biases nothing, and it leaves nothing of arms that are the same.

Worlds of different seeds have different users and models, so their lifts are independent. The error
of their mean is what users say, or what the seeds themselves say where that is larger, with the
degrees of freedom of whichever it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from app.ab_report.lift import (
    Estimate,
    UserSums,
    around,
    is_clearly_nonzero,
    linearised,
    ratio_variance,
    welch_degrees,
)
from benchmarks.paper.table3_world import Lives

CONFIDENCE = 0.95


@dataclass(frozen=True)
class LifeMetric:
    """A ratio of sums over users; per user where ``per`` is empty."""

    name: str
    title: str
    signal: str
    per: str = "items"

    def sums(self, lives: Lives, users_U: NDArray[np.bool_]) -> UserSums:
        """The metric of some users."""
        numerator = lives[self.signal][users_U]
        return UserSums(
            numerator, lives[self.per][users_U] if self.per else np.ones_like(numerator)
        )


METRICS = (
    LifeMetric("long_view_rate", "long views per item", "long_views"),
    LifeMetric("expected_long_view_rate", "their true chance", "expected_long_views"),
    LifeMetric("watch_time_per_item_s", "watch time per item", "watch_s"),
    LifeMetric("watch_time_per_user_s", "watch time per user", "watch_s", per=""),
)


@dataclass(frozen=True)
class SeedLift:
    """Treatment over control, less 1, in one world; NaN where the control has next to nothing."""

    control: float  # the metric itself
    value: float
    variance: float
    degrees: float  # of freedom


@dataclass(frozen=True)
class PooledLift:
    """The mean over worlds."""

    lift: Estimate
    p_value: float  # two-sided, of no difference; not adjusted for other comparisons
    control: float
    per_seed: tuple[float, ...]
    error_users: float  # standard error of the mean as users say
    error_seeds: float  # as the spread of the seeds says; NaN for a single one


def plain_lift(metric: LifeMetric, lives: Lives, treated_U: NDArray[np.bool_]) -> SeedLift:
    """The arms as they are; users who never came are left out."""
    control, arm = _arms(metric, lives, treated_U)
    return _lift(
        (control.mean, arm.mean),
        (ratio_variance(control), ratio_variance(arm)),
        (len(control), len(arm)),
    )


def adjusted_lift(
    metric: LifeMetric, lives: Lives, without: Lives, treated_U: NDArray[np.bool_]
) -> SeedLift:
    """The arms without what the users' lives ``without`` the experiment explain.

    Raises:
        ValueError: when the lives are not of the same users at the same times.
    """
    if not np.array_equal(lives["requests"], without["requests"]):
        raise ValueError("both lives must be of the same users at the same times: use one seed")
    arms, before = _arms(metric, lives, treated_U), _arms(metric, without, treated_U)
    pulls = [linearised(sums) for sums in arms]
    known = [linearised(sums) for sums in before]
    explained = sum(float(x @ x) for x in known)
    together = sum(float(x @ y) for x, y in zip(known, pulls, strict=True))
    slope = together / explained if explained > 0 else 0.0
    came = without["requests"] > 0
    everyone = metric.sums(without, came).mean
    means = [
        now.mean - slope * (then.mean - everyone) for now, then in zip(arms, before, strict=True)
    ]
    # The fitted slope makes residuals too small, and its own error moves the means.
    freedom = len(pulls[0]) + len(pulls[1]) - 2
    inflation = (freedom + 1) / (freedom - 1) if freedom > 1 else math.inf
    variances = [
        inflation * float(np.var(y - slope * x, ddof=1)) / len(y)
        for x, y in zip(known, pulls, strict=True)
    ]
    return _lift((means[0], means[1]), (variances[0], variances[1]), (len(arms[0]), len(arms[1])))


def pooled_lift(lifts: Sequence[SeedLift]) -> PooledLift:
    """One lift over all worlds; each counts the same."""
    if not lifts:
        raise ValueError("there is no lift to pool; run at least one seed")
    count = len(lifts)
    values = np.array([one.value for one in lifts])
    variances = np.array([one.variance for one in lifts])
    error_users = math.sqrt(variances.sum()) / count
    error_seeds = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    if count > 1 and error_seeds > error_users:
        error, degrees = error_seeds, count - 1.0
    else:
        spread = sum(one.variance**2 / one.degrees for one in lifts)
        error, degrees = error_users, variances.sum() ** 2 / spread if spread > 0 else math.inf
    mean = float(values.mean())
    if error == 0:
        margin, p_value = 0.0, 1.0 if mean == 0 else 0.0
    else:  # what is not a number stays that
        margin = float(stdtrit(degrees, 0.5 + CONFIDENCE / 2)) * error
        p_value = 2 * float(stdtr(degrees, -abs(mean) / error))
    control = float(np.mean([one.control for one in lifts]))
    return PooledLift(
        around(mean, margin), p_value, control, tuple(values.tolist()), error_users, error_seeds
    )


def _arms(
    metric: LifeMetric, lives: Lives, treated_U: NDArray[np.bool_]
) -> tuple[UserSums, UserSums]:
    """The metric of (control, treatment) of the users who came."""
    came = lives["requests"] > 0
    return metric.sums(lives, came & ~treated_U), metric.sums(lives, came & treated_U)


def _lift(
    means: tuple[float, float], variances: tuple[float, float], users: tuple[int, int]
) -> SeedLift:
    """The relative lift of disjoint users, (control, treatment), by the delta method."""
    control, arm = means
    if not is_clearly_nonzero(control, math.sqrt(variances[0])):
        return SeedLift(control, math.nan, math.nan, math.nan)
    ratio = arm / control
    parts = ratio**2 * variances[0] / control**2, variances[1] / control**2
    return SeedLift(control, ratio - 1.0, sum(parts), welch_degrees(parts, users))
