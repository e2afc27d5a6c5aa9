"""CUPED: less variance, the same effect, no bias from covariates that tell nothing."""

from __future__ import annotations

import numpy as np
import pytest
from ab_logs import make_feedback
from numpy.typing import NDArray

from app.ab_report.cuped import cuped_sums, variance_reduction
from app.ab_report.history import History
from app.ab_report.lift import DeltaMethod, UserSums
from app.ab_report.metrics import METRICS
from marm.events import TASKS

Arms = tuple[dict[str, UserSums], dict[str, NDArray[np.float64]]]


def make_arms(users: int, lift: float, rng: np.random.Generator, share: float = 0.8) -> Arms:
    """A mean per user of which earlier behaviour explains ``share`` of the variance."""
    sums, covariates = {}, {}
    for arm, effect in (("control", 0.0), ("better", lift)):
        before = rng.normal(10, 2, users)
        now = before * np.sqrt(share) + rng.normal(0, 2 * np.sqrt(1 - share), users)
        sums[arm] = UserSums(now + effect, np.ones(users))
        covariates[arm] = before[:, None]
    return sums, covariates


def test_variance_falls_by_what_is_explained() -> None:
    sums, covariates = make_arms(4_000, 0.1, np.random.default_rng(0))
    adjusted = cuped_sums(sums, covariates)
    pairs = (sums["control"], sums["better"]), (adjusted["control"], adjusted["better"])
    assert variance_reduction(*pairs) == pytest.approx(0.8, abs=0.02)
    plain, cuped = DeltaMethod().compare(*pairs[0]), DeltaMethod().compare(*pairs[1])
    assert cuped.standard_error < 0.5 * plain.standard_error
    assert cuped.absolute.low < 0.1 < cuped.absolute.high


def test_adjusted_lifts_cover() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(1_000):
        adjusted = cuped_sums(*make_arms(100, 0.5, rng))
        lift = DeltaMethod().compare(adjusted["control"], adjusted["better"])
        held += lift.absolute.low <= 0.5 <= lift.absolute.high
    assert held / 1_000 == pytest.approx(0.95, abs=0.02)


def test_small_experiments_pay_for_useless_covariates() -> None:
    """The slopes of eight covariates fitted to forty users don't make the interval too narrow."""
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(1_000):
        sums, _ = make_arms(20, 0.0, rng)
        adjusted = cuped_sums(sums, {arm: rng.normal(size=(20, 8)) for arm in sums})
        lift = DeltaMethod().compare(adjusted["control"], adjusted["better"])
        held += not lift.absolute.excludes_zero
    assert held / 1_000 == pytest.approx(0.95, abs=0.02)


def test_too_few_users_are_not_adjusted() -> None:
    sums, _ = make_arms(5, 0.0, np.random.default_rng(6))
    noise = {arm: np.random.default_rng(7).normal(size=(5, 6)) for arm in sums}
    assert cuped_sums(sums, noise) == sums


def test_ratio_metrics_gain_too() -> None:
    rng = np.random.default_rng(2)
    sums, covariates = {}, {}
    for arm in ("control", "better"):
        taste = rng.beta(3, 7, 2_000)
        items = 1.0 + rng.poisson(20, 2_000)
        sums[arm] = UserSums(rng.binomial(items.astype(int), taste).astype(float), items)
        covariates[arm] = np.stack([rng.binomial(50, taste), np.full(2_000, 50)], axis=1) / 1.0
    adjusted = cuped_sums(sums, covariates)
    pairs = (sums["control"], sums["better"]), (adjusted["control"], adjusted["better"])
    assert variance_reduction(*pairs) > 0.5
    # The ratio moves by theta times how far the arm's covariates are from everybody's.
    assert adjusted["control"].mean == pytest.approx(sums["control"].mean, abs=0.02)


def test_useless_covariates_change_nothing() -> None:
    sums, _ = make_arms(500, 0.0, np.random.default_rng(3))
    flat = {arm: np.full((500, 2), 7.0) for arm in sums}
    adjusted = cuped_sums(sums, flat)
    for arm in sums:
        np.testing.assert_allclose(adjusted[arm].numerator, sums[arm].numerator)


def test_covariates_must_fit() -> None:
    sums, covariates = make_arms(50, 0.0, np.random.default_rng(4))
    with pytest.raises(ValueError, match="a row for each of its 50 users"):
        cuped_sums(sums, covariates | {"better": covariates["better"][:10]})


def test_history_sums_events_of_its_users() -> None:
    events = make_feedback(
        [(7, 1, 10, {"long_view": 1}), (7, 2, 20, {"long_view": 1}), (9, 1, 5, {"click": 1})]
    )
    history = History(events, np.array([5, 7]))
    assert history.users_with_history == 1
    long_views = next(metric for metric in METRICS if metric.name == "long_view_rate")
    covariates = history.covariates(long_views)
    assert covariates[0, 0] == 0
    assert covariates[1, 0] == 2
    np.testing.assert_array_equal(covariates[:, 2], [0, 2])  # events
    requests = next(metric for metric in METRICS if metric.task is None)
    assert history.covariates(requests).shape == (2, 3)
    assert len(TASKS) == events.labels.shape[1]


def test_history_of_nobody() -> None:
    history = History(make_feedback([]), np.array([1, 2]))
    assert history.users_with_history == 0
    assert np.isfinite(history.covariates(METRICS[0])).all()
