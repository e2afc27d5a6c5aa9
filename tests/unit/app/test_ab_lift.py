"""Lifts: the delta method and the bootstrap against each other, against scipy, and coverage."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from app.ab_report.bootstrap import UserBootstrap, poisson_weights
from app.ab_report.lift import DeltaMethod, LiftMethod, UserSums


def make_sums(users: int, rate: float, rng: np.random.Generator) -> UserSums:
    """Users who differ in activity and in taste: items shown, and long views among them."""
    items = 1 + rng.poisson(rng.gamma(2.0, 8.0, users))
    taste = rng.beta(20 * rate, 20 * (1 - rate), users)
    return UserSums(rng.binomial(items, taste).astype(np.float64), items.astype(np.float64))


def coverage(method: LiftMethod, experiments: int, users: int, seed: int) -> float:
    """How often the interval of the absolute lift holds the truth, 0.02."""
    rng = np.random.default_rng(seed)
    held = 0
    for number in range(experiments):
        if isinstance(method, UserBootstrap):
            method = replace(method, seed=number)
        lift = method.compare(make_sums(users, 0.30, rng), make_sums(users, 0.32, rng))
        held += lift.absolute.low <= 0.02 <= lift.absolute.high
    return held / experiments


def test_mean_per_user_is_welch_t() -> None:
    rng = np.random.default_rng(1)
    control, arm = rng.normal(5, 1, 40), rng.normal(5.4, 3, 25)
    lift = DeltaMethod().compare(UserSums(control, np.ones(40)), UserSums(arm, np.ones(25)))
    expected = scipy.stats.ttest_ind(arm, control, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert lift.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert lift.absolute.low == pytest.approx(interval.low, rel=1e-9)
    assert lift.absolute.high == pytest.approx(interval.high, rel=1e-9)


def test_delta_method_and_bootstrap_agree() -> None:
    rng = np.random.default_rng(2)
    control, arm = make_sums(3_000, 0.30, rng), make_sums(2_000, 0.33, rng)
    delta = DeltaMethod().compare(control, arm)
    bootstrap = UserBootstrap(resamples=4_000, seed=3).compare(control, arm)
    assert bootstrap.standard_error == pytest.approx(delta.standard_error, rel=0.05)
    for ours, theirs in (
        (delta.absolute, bootstrap.absolute),
        (delta.relative, bootstrap.relative),
    ):
        width = ours.high - ours.low
        assert theirs.value == pytest.approx(ours.value)
        assert theirs.low == pytest.approx(ours.low, abs=0.05 * width)
        assert theirs.high == pytest.approx(ours.high, abs=0.05 * width)
    assert delta.p_value < 0.001
    assert bootstrap.p_value < 0.001


def test_delta_method_covers() -> None:
    # 3 standard errors of the coverage itself are 0.02.
    assert coverage(DeltaMethod(), 1_000, 150, seed=4) == pytest.approx(0.95, abs=0.02)
    assert coverage(DeltaMethod(0.8), 1_000, 150, seed=5) == pytest.approx(0.80, abs=0.04)


def test_bootstrap_covers() -> None:
    method = UserBootstrap(resamples=500)
    assert coverage(method, 400, 150, seed=6) == pytest.approx(0.95, abs=0.033)


def test_items_are_not_independent() -> None:
    """What clusters are for: with items as the unit, the error would be a fraction of this."""
    rng = np.random.default_rng(7)
    control, arm = make_sums(500, 0.3, rng), make_sums(500, 0.3, rng)
    naive = math.sqrt(
        sum(sums.mean * (1 - sums.mean) / sums.denominator.sum() for sums in (control, arm))
    )
    assert DeltaMethod().compare(control, arm).standard_error > 1.3 * naive


def test_relative_lift_needs_a_control_above_zero() -> None:
    rng = np.random.default_rng(8)
    near_zero = UserSums(rng.normal(0.01, 1, 200), np.ones(200))
    arm = UserSums(rng.normal(1, 1, 200), np.ones(200))
    for method in (DeltaMethod(), UserBootstrap(resamples=200)):
        lift = method.compare(near_zero, arm)
        assert math.isnan(lift.relative.value)
        assert lift.absolute.excludes_zero


def test_constant_metric_has_no_lift() -> None:
    flat = UserSums(np.zeros(10), np.ones(10))
    lift = DeltaMethod().compare(flat, flat)
    assert (lift.absolute.low, lift.absolute.high, lift.p_value) == (0.0, 0.0, 1.0)
    assert DeltaMethod().compare(flat, UserSums(np.ones(10), np.ones(10))).p_value == 0.0


def test_poisson_weights_are_poisson() -> None:
    weights = np.concatenate(list(poisson_weights(5_000, 100, np.random.default_rng(9))))
    assert weights.shape == (100, 5_000)
    assert weights.mean() == pytest.approx(1, abs=0.005)
    assert weights.var() == pytest.approx(1, abs=0.01)


def test_bootstrap_repeats_with_its_seed() -> None:
    rng = np.random.default_rng(10)
    control, arm = make_sums(100, 0.3, rng), make_sums(100, 0.3, rng)
    method = UserBootstrap(resamples=200, seed=1)
    assert method.compare(control, arm) == method.compare(control, arm)
    assert method.compare(control, arm) != replace(method, seed=2).compare(control, arm)


@pytest.mark.parametrize(
    ("numerator", "denominator", "message"),
    [
        ([1.0], [1.0], "at least 2 users"),
        ([1.0, 2.0], [1.0], "one length"),
        ([1.0, np.nan], [1.0, 1.0], "finite"),
        ([1.0, 1.0], [0.0, 0.0], "more than 0"),
    ],
)
def test_bad_sums_are_refused(
    numerator: list[float], denominator: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        UserSums(np.array(numerator), np.array(denominator))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="confidence"):
        DeltaMethod(1.0)
    with pytest.raises(ValueError, match="confidence"):
        UserBootstrap(95)
    with pytest.raises(ValueError, match="resamples"):
        UserBootstrap(resamples=10)
