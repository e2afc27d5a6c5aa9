"""The lift of a quantile over requests, such as p99 of the latency, with users as clusters.

Woodruff's interval: the share of requests below the quantile is a ratio whose variance over users
the delta method gives; its bounds, read off the distribution, bound the quantile (Deng, Knoblich,
Lu, KDD 2018, section 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from app.ab_report.lift import UNKNOWN, Estimate, Lift, UserSums, ratio_variance, welch_lift


@dataclass(frozen=True)
class RequestValues:
    """``R`` requests of ``U`` users: a value each, and whose it is."""

    values: NDArray[np.float64]  # [R]
    user: NDArray[np.int64]  # [R], 0 .. U - 1
    num_users: int


def quantile_lift(
    control: RequestValues, arm: RequestValues, share: float, confidence: float
) -> Lift:
    """The lift of the ``share`` quantile; NaN intervals when an arm has too few requests."""
    found = [_quantile(side, share, confidence) for side in (control, arm)]
    (control_value, control_error), (arm_value, arm_error) = found
    if not math.isfinite(control_error + arm_error):
        unknown = Estimate(arm_value - control_value, math.nan, math.nan)
        return Lift(control_value, arm_value, unknown, UNKNOWN, math.nan, math.nan)
    return welch_lift(
        (control_value, arm_value),
        (control_error**2, arm_error**2),
        (control.num_users, arm.num_users),
        confidence,
    )


def _quantile(side: RequestValues, share: float, confidence: float) -> tuple[float, float]:
    """The quantile and its standard error; NaN when the tail is too thin to tell."""
    value = float(np.quantile(side.values, share))
    below = np.bincount(side.user, side.values <= value, minlength=side.num_users)
    requests = np.bincount(side.user, minlength=side.num_users).astype(np.float64)
    critical = float(ndtri(0.5 + confidence / 2))
    margin = critical * math.sqrt(ratio_variance(UserSums(below.astype(np.float64), requests)))
    if not margin > 0:  # all requests of all users below: one value for everything
        return value, 0.0 if np.ptp(side.values) == 0 else math.nan
    if share + margin >= 1 or share - margin <= 0:
        return value, math.nan
    low, high = np.quantile(side.values, [share - margin, share + margin])
    return value, float(high - low) / (2 * critical)
