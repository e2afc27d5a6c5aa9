"""Sample ratio, Holm, power, and quantiles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from app.ab_report.checks import holm, minimum_detectable, sample_ratio
from app.ab_report.lift import DeltaMethod, UserSums
from app.ab_report.quantile import RequestValues, quantile_lift


def test_sample_ratio_is_the_chi_square_test() -> None:
    found = sample_ratio({"a": 480, "b": 520, "c": 260}, {"a": 0.4, "b": 0.4, "c": 0.2})
    expected = scipy.stats.chisquare([480, 520, 260], [504, 504, 252])
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.expected == pytest.approx({"a": 504, "b": 504, "c": 252})
    assert not found.mismatch


def test_mismatch_is_noticed() -> None:
    assert sample_ratio({"a": 5_000, "b": 5_400}, {"a": 1, "b": 1}).mismatch
    assert not sample_ratio({"a": 5_000, "b": 5_100}, {"a": 1, "b": 1}).mismatch


def test_an_arm_without_users_counts() -> None:
    assert sample_ratio({"a": 100}, {"a": 0.5, "b": 0.5}).mismatch
    assert not sample_ratio({"a": 100}, {"a": 1.0, "b": 0.0}).mismatch
    assert sample_ratio({"a": 100, "b": 1}, {"a": 1.0, "b": 0.0}).mismatch


def test_bad_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="weights are missing for the arms b"):
        sample_ratio({"a": 1, "b": 1}, {"a": 1.0})
    with pytest.raises(ValueError, match="0 or more"):
        sample_ratio({"a": 1}, {"a": -1.0})
    with pytest.raises(ValueError, match="above 0"):
        sample_ratio({"a": 1}, {"a": 0.0})


def test_holm_by_hand() -> None:
    # Sorted .01 .02 .03 .04 times 4, 3, 2, 1, never falling: .04 .06 .06 .06
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1.0, 1.0])
    assert len(holm([])) == 0


def test_minimum_detectable_lift_is_found_as_often_as_promised() -> None:
    rng = np.random.default_rng(0)
    error = math.sqrt(2 / 400)
    lift = minimum_detectable(error, 0.95)
    found = 0
    for _ in range(1_000):
        control, arm = rng.normal(0, 1, 400), rng.normal(lift, 1, 400)
        ones = np.ones(400)
        compared = DeltaMethod().compare(UserSums(control, ones), UserSums(arm, ones))
        found += compared.absolute.low > 0
    assert found / 1_000 == pytest.approx(0.80, abs=0.04)


def make_latencies(users: int, scale: float, rng: np.random.Generator) -> RequestValues:
    """Requests of users who are near or far from the servers."""
    count = 1 + rng.poisson(20, users)
    user = np.repeat(np.arange(users), count)
    far = np.exp(0.3 * rng.standard_normal(users))[user]
    return RequestValues(scale * far * rng.lognormal(0, 0.3, len(user)), user, users)


def test_quantile_interval_covers() -> None:
    rng = np.random.default_rng(1)
    sigma = math.hypot(0.3, 0.3)
    truth = 5 * math.exp(sigma * scipy.stats.norm.ppf(0.9))
    held = 0
    for _ in range(400):
        control, arm = make_latencies(300, 50, rng), make_latencies(300, 55, rng)
        lift = quantile_lift(control, arm, 0.9, 0.95)
        held += lift.absolute.low <= truth <= lift.absolute.high
    assert held / 400 == pytest.approx(0.95, abs=0.033)


def test_quantile_agrees_with_resampled_users() -> None:
    rng = np.random.default_rng(2)
    arms = make_latencies(500, 50, rng), make_latencies(500, 55, rng)
    differences = []
    for _ in range(500):
        quantiles = []
        for side in arms:
            weight = rng.poisson(1, side.num_users)[side.user]
            quantiles.append(np.quantile(np.repeat(side.values, weight), 0.95))
        differences.append(quantiles[1] - quantiles[0])
    lift = quantile_lift(*arms, 0.95, 0.95)
    assert lift.standard_error == pytest.approx(np.std(differences), rel=0.15)


def test_quantile_of_too_few_requests_is_unknown() -> None:
    few = make_latencies(3, 50, np.random.default_rng(3))
    lift = quantile_lift(few, few, 0.99, 0.95)
    assert lift.absolute.value == 0
    assert math.isnan(lift.absolute.low)
    assert math.isnan(lift.p_value)


def test_quantile_of_one_value_is_certain() -> None:
    flat = RequestValues(np.full(10, 5.0), np.repeat(np.arange(5), 2), 5)
    lift = quantile_lift(flat, flat, 0.99, 0.95)
    assert (lift.absolute.low, lift.absolute.high) == (0.0, 0.0)
