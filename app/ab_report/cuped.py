"""CUPED: what users did before the experiment explains part of how they differ in it.

Deng, Xu, Kohavi, Walker: Improving the Sensitivity of Online Controlled Experiments by Utilizing
Pre-Experiment Data, WSDM 2013. Nothing from the time of the experiment enters, so the arms are not
biased against each other, and the adjusted sums can be compared by any `LiftMethod`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from app.ab_report.lift import UserSums, linearised, ratio_variance


def cuped_sums(
    arms: Mapping[str, UserSums], covariates: Mapping[str, NDArray[np.float64]]
) -> dict[str, UserSums]:
    """The sums of all arms of an experiment with the part that ``covariates`` explain removed.

    ``covariates[arm]`` is ``[U, P]``: ``P`` numbers per user that the experiment can't have
    changed. The slope is one for all arms, from deviations within them, and covariates are centred
    on all users together; so the adjusted ratio is ``R - theta (mean of the arm - mean of all)``.
    Columns that tell nothing have no effect; with too few users to tell, nothing is adjusted.
    """
    for arm, sums in arms.items():
        if covariates[arm].ndim != 2 or len(covariates[arm]) != len(sums):
            raise ValueError(
                f"covariates of {arm!r} must have a row for each of its {len(sums)} users, got "
                f"shape {covariates[arm].shape}"
            )
    everyone = np.concatenate([covariates[arm] for arm in arms]).mean(axis=0)
    within = np.concatenate([covariates[arm] - covariates[arm].mean(axis=0) for arm in arms])
    response = np.concatenate([linearised(sums) for sums in arms.values()])
    # Columns may be on any scale; a constant one stays zero.
    scale = within.std(axis=0)
    scale[scale == 0] = 1.0
    fitted, _, rank, _ = np.linalg.lstsq(within / scale, response, rcond=None)
    freedom = len(response) - len(arms)
    if freedom <= 2 * rank:
        return dict(arms)
    # Fitting theta makes the residuals too small, and theta's own error moves the means: together
    # (f + p) / (f - p) of variance, which only small experiments notice.
    inflation = math.sqrt((freedom + rank) / (freedom - rank))
    return {
        arm: _adjusted(sums, (covariates[arm] - everyone) @ (fitted / scale), inflation)
        for arm, sums in arms.items()
    }


def variance_reduction(plain: tuple[UserSums, UserSums], cuped: tuple[UserSums, UserSums]) -> float:
    """Share of the variance of a lift that CUPED removed: 0.5 is worth twice as many users."""
    before = sum(ratio_variance(sums) for sums in plain)
    return 1.0 - sum(ratio_variance(sums) for sums in cuped) / before if before > 0 else 0.0


def _adjusted(sums: UserSums, explained: NDArray[np.float64], inflation: float) -> UserSums:
    """Without what is ``explained`` of each user's pull on the ratio; residuals grow by
    ``inflation``, which leaves the ratio as it is."""
    removed = UserSums(sums.numerator - sums.denominator.mean() * explained, sums.denominator)
    expected = removed.mean * removed.denominator
    return UserSums(expected + inflation * (removed.numerator - expected), removed.denominator)
