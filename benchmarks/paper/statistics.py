"""How good, how sure: GAUC over seeds, and paired comparisons of two methods user by user.

Two methods predict the same events, so they are compared on each user: the difference of the user's
AUCs, as its mean over seeds, weighted by samples as GAUC (Eq. 10) weighs them. The mean difference
is the difference of the GAUCs.

Other users would have given another one, and so would other seeds: the interval is over both. Each
has a standard error of its own, from the users' differences and from the seeds', and a margin by
Student's t of as many users, or seeds; the squares of the margins are added. Few seeds say little
of their own spread, so theirs counts 4.3 times with three of them. What is noise of a user in one
seed is in both margins: intervals are rather too wide than too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import stdtrit

from app.ab_report.bootstrap import resampled_means
from app.ab_report.lift import Estimate, UserSums, around, ratio_variance
from benchmarks.paper.trial import Predictions
from marm.metrics import auc, log_loss

CONFIDENCE = 0.95
"""Of every interval."""

_SMALLEST_P = 1e-9


@dataclass(frozen=True)
class UserAucs:
    """AUC of every user who has both labels."""

    user_id: NDArray[np.int64]  # [U], ascending
    auc: NDArray[np.float64]  # [U]
    samples: NDArray[np.int64]  # [U]

    @property
    def gauc(self) -> float:
        """Eq. (10); NaN without users."""
        total = self.samples.sum()
        return float((self.auc * self.samples).sum() / total) if total else math.nan


@dataclass(frozen=True)
class Spread:
    """One figure over seeds. ``std`` (of the seeds, not of their mean) is NaN for a single one."""

    mean: float
    std: float
    values: tuple[float, ...]

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Mean and sample standard deviation."""
        std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        return Spread(float(np.mean(values)), std, tuple(float(value) for value in values))


@dataclass(frozen=True)
class PairedDifference:
    """One method less another, of GAUC or of a mean over events."""

    difference: Estimate  # the mean over seeds, with its interval over users and seeds
    p_value: float  # two-sided, of no difference; not adjusted for other comparisons
    per_seed: tuple[float, ...]
    users: int
    error_users: float  # standard error of the mean as users say
    error_seeds: float  # as the spread of the seeds says; NaN for a single one

    @property
    def is_gain(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.difference.low > 0


def linearised_error(sums: UserSums) -> float:
    """Standard error of a ratio of sums over users, by the delta method."""
    return math.sqrt(ratio_variance(sums))


def bootstrap_error(sums: UserSums, resamples: int = 2_000, seed: int = 0) -> float:
    """The same by resampling users: slower, and without an approximation."""
    return float(np.std(resampled_means(sums, resamples, np.random.default_rng(seed)), ddof=1))


def paired_estimate(
    sums: UserSums,
    per_seed: Sequence[float],
    error_over_users: Callable[[UserSums], float] = linearised_error,
) -> PairedDifference:
    """A mean difference with its interval over users and seeds.

    Args:
        sums: of the differences of each user, means over seeds, and their weights.
        per_seed: the mean difference of every seed. A single one tells nothing of other seeds: the
            interval is then over users alone.
        error_over_users: standard error of the mean of ``sums``.
    """
    count, mean = len(per_seed), sums.mean
    users = error_over_users(sums)
    seeds = float(np.std(per_seed, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    parts = [(users, len(sums) - 1)] + ([(seeds, count - 1)] if count > 1 else [])
    margin = _margin(parts, CONFIDENCE)
    return PairedDifference(
        around(mean, margin), _p_value(mean, parts), tuple(per_seed), len(sums), users, seeds
    )


def _margin(parts: Sequence[tuple[float, int]], confidence: float) -> float:
    """Half an interval, of independent standard errors with their degrees of freedom."""
    margins = [error * float(stdtrit(freedom, 0.5 + confidence / 2)) for error, freedom in parts]
    return math.hypot(*margins)


def _p_value(mean: float, parts: Sequence[tuple[float, int]]) -> float:
    """One less the confidence of the interval that ends at zero, from `_SMALLEST_P` on."""
    if math.isnan(mean) or any(math.isnan(error) for error, _ in parts):
        return math.nan
    if mean == 0 or _margin(parts, 1 - _SMALLEST_P) <= abs(mean):
        return 1.0 if mean == 0 else _SMALLEST_P
    return float(brentq(lambda p: _margin(parts, 1 - p) - abs(mean), _SMALLEST_P, 1.0))


def user_aucs(found: Predictions) -> UserAucs:
    """AUC of each user, ties counting half, all users at once; NaN where a score is NaN."""
    order = np.lexsort((found.score, found.user_id))
    user, score = found.user_id[order], found.score[order]
    positive = (found.label[order] > 0).astype(np.int64)
    users, starts, samples = np.unique(user, return_index=True, return_counts=True)
    if not len(users):
        return UserAucs(users, np.empty(0), samples)
    new_tie = np.append(True, (user[1:] != user[:-1]) | (score[1:] != score[:-1]))
    tie_start = np.flatnonzero(new_tie)
    tie = np.cumsum(new_tie) - 1
    tie_end = np.append(tie_start[1:], len(user))[tie]
    # The mean of the ranks, from 1, of all that tie; counted from where the user begins.
    rank = (tie_start[tie] + tie_end + 1) / 2.0 - np.repeat(starts, samples)
    positives = np.add.reduceat(positive, starts)
    negatives = samples - positives
    rank_sum = np.add.reduceat(rank * positive, starts)
    both = (positives > 0) & (negatives > 0)
    area = (rank_sum - positives * (positives + 1) / 2.0)[both]
    area[np.add.reduceat(np.isnan(score), starts)[both] > 0] = math.nan
    return UserAucs(users[both], area / (positives * negatives)[both], samples[both])


def quality(seeds: Sequence[Predictions]) -> dict[str, Spread]:
    """AUC, GAUC and log loss over the seeds of one method."""
    return {
        "auc": Spread.of([auc(found.label, found.score) for found in seeds]),
        "gauc": Spread.of([user_aucs(found).gauc for found in seeds]),
        "log_loss": Spread.of([log_loss(found.label, found.score) for found in seeds]),
    }


def paired_difference(
    first: Sequence[Predictions],
    second: Sequence[Predictions],
    error_over_users: Callable[[UserSums], float] = linearised_error,
) -> PairedDifference:
    """GAUC of ``first`` less that of ``second``; both seed by seed, of the same events.

    Raises:
        ValueError: when the two are not of the same events, or not of as many seeds, or when fewer
            than two users have both labels.
    """
    _check_same_events(first, second)
    pairs = [(user_aucs(a), user_aucs(b)) for a, b in zip(first, second, strict=True)]
    samples = pairs[0][0].samples
    if len(samples) < 2:
        raise ValueError(
            f"a paired test needs at least 2 users with both labels, got {len(samples)}; evaluate "
            "more events"
        )
    gap_SU = np.stack([a.auc - b.auc for a, b in pairs])
    sums = UserSums(gap_SU.mean(axis=0) * samples, samples.astype(np.float64))
    return paired_estimate(sums, [a.gauc - b.gauc for a, b in pairs], error_over_users)


def _check_same_events(first: Sequence[Predictions], second: Sequence[Predictions]) -> None:
    if not first or len(first) != len(second):
        raise ValueError(
            f"a paired test needs the same seeds of both, got {len(first)} and {len(second)}"
        )
    reference: Any = first[0]
    for other in (*first, *second):
        for column in ("user_id", "timestamp_ms", "label"):
            if not np.array_equal(getattr(reference, column), getattr(other, column)):
                raise ValueError(
                    f"a paired test needs predictions of the same events, but {column} differs; "
                    "run both on the same data set and window"
                )
