"""Paired comparisons find what was planted, say nothing where nothing is, and know their limits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import stdtrit

from app.ab_report.lift import UserSums
from benchmarks.paper.statistics import (
    Spread,
    bootstrap_error,
    paired_difference,
    paired_estimate,
    quality,
    user_aucs,
)
from benchmarks.paper.trial import Predictions
from marm.metrics import auc, gauc


def make_predictions(
    seed: int, users: int = 60, per_user: int = 30, signal: float = 0.0
) -> Predictions:
    """Noise plus ``signal`` times the label. The events are the same for every seed."""
    events = np.random.default_rng(7)
    count = users * per_user
    label = (events.random(count) < 0.4).astype(np.float32)
    noise = np.random.default_rng([seed, 1]).normal(size=count)
    return Predictions(
        np.arange(count) % users,
        label,
        (noise + signal * label).astype(np.float32),
        np.arange(count),
    )


def better(of: Predictions, by: float) -> Predictions:
    return replace(of, score=of.score + np.float32(by) * of.label)


def test_user_aucs_equal_the_plain_ones_with_ties_and_lone_labels() -> None:
    rng = np.random.default_rng(0)
    found = Predictions(
        rng.integers(0, 40, 300),
        (rng.random(300) < 0.3).astype(np.float32),
        np.round(rng.random(300), 1).astype(np.float32),
        np.arange(300),
    )
    users = user_aucs(found)
    expected = {}
    for user in range(40):
        of = found.user_id == user
        value = auc(found.label[of], found.score[of])
        if not math.isnan(value):
            expected[user] = (value, int(of.sum()))
    assert len(expected) < 40  # some users have one label only
    assert users.user_id.tolist() == list(expected)
    np.testing.assert_allclose(users.auc, [value for value, _ in expected.values()])
    assert users.samples.tolist() == [count for _, count in expected.values()]
    assert users.gauc == pytest.approx(gauc(found.user_id, found.label, found.score))


def test_no_predictions_and_no_numbers() -> None:
    empty = Predictions(
        *(np.empty(0, kind) for kind in (np.int64, np.float32, np.float32, np.int64))
    )
    assert math.isnan(user_aucs(empty).gauc)
    found = make_predictions(0)
    broken = replace(found, score=np.where(found.user_id == 3, np.nan, found.score))
    assert np.isnan(user_aucs(broken).auc).sum() == 1
    assert math.isnan(user_aucs(broken).gauc)


def test_the_difference_is_that_of_the_gaucs() -> None:
    second = [make_predictions(seed) for seed in range(3)]
    first = [better(one, 0.5) for one in second]
    found = paired_difference(first, second)
    gaps = [user_aucs(a).gauc - user_aucs(b).gauc for a, b in zip(first, second, strict=True)]
    assert found.per_seed == pytest.approx(gaps)
    assert found.difference.value == pytest.approx(np.mean(gaps))
    assert found.users == 60


def test_a_planted_gain_is_found_and_its_reverse_is_a_loss() -> None:
    second = [make_predictions(seed) for seed in range(3)]
    first = [better(one, 0.05) for one in second]
    gain = paired_difference(first, second)
    assert gain.is_gain
    assert gain.p_value < 0.001
    loss = paired_difference(second, first)
    assert not loss.is_gain
    assert loss.difference.high == pytest.approx(-gain.difference.low)


def test_pairing_finds_what_the_spread_between_users_hides() -> None:
    second = make_predictions(0, signal=0.3)
    found = paired_difference([better(second, 0.02)], [second])
    users = user_aucs(second)
    unpaired_error = users.auc.std(ddof=1) / math.sqrt(len(users.auc))
    assert found.is_gain
    assert found.difference.value < unpaired_error


def test_intervals_cover_no_difference_as_often_as_they_say() -> None:
    """200 comparisons of noise with noise; the share is that of fixed seeds."""
    covered = [
        low <= 0 <= high
        for seed in range(200)
        for low, high in [_interval(make_predictions(2 * seed), make_predictions(2 * seed + 1))]
    ]
    assert 0.91 < np.mean(covered) < 0.99


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("of_user", [0.0, 1.0])
def test_intervals_cover_what_other_users_and_seeds_would_say(
    num_seeds: int, shift: float, of_user: float
) -> None:
    """2,000 comparisons of methods that are alike. Each seed moves a method by ``shift`` standard
    errors over users, for all users alike; ``of_user`` of a user's noise is his in every seed."""
    rng, num_users = np.random.default_rng(0), 40
    own_TU = of_user * rng.normal(size=(2_000, 1, num_users))
    noise_TSU = (1 - of_user) * rng.normal(size=(2_000, num_seeds, num_users))
    moved_TS1 = shift * num_users**-0.5 * rng.normal(size=(2_000, num_seeds, 1))
    covered, over_users = [], []
    for gap_SU in own_TU + noise_TSU + moved_TS1:
        sums = UserSums(gap_SU.mean(axis=0), np.ones(num_users))
        found = paired_estimate(sums, gap_SU.mean(axis=1).tolist())
        covered.append(found.difference.low <= 0 <= found.difference.high)
        assert covered[-1] == (found.p_value >= 0.05)
        over_users.append(abs(sums.mean) <= 1.96 * found.error_users)
    assert np.mean(covered) > 0.94
    if shift == 10.0:  # what an interval over users alone would promise and not hold
        assert np.mean(over_users) < 0.5


def test_one_seed_says_nothing_of_others() -> None:
    found = paired_difference([better(make_predictions(0), 0.5)], [make_predictions(0)])
    assert math.isnan(found.error_seeds)
    margin = found.difference.high - found.difference.value
    assert margin == pytest.approx(stdtrit(found.users - 1, 0.975) * found.error_users)


def _interval(first: Predictions, second: Predictions) -> tuple[float, float]:
    found = paired_difference([first], [second]).difference
    return found.low, found.high


def test_users_count_by_their_samples() -> None:
    """One user with most samples gains, all others lose: the mean follows the samples."""
    found = make_predictions(0, users=10, per_user=20)
    big = make_predictions(0, users=1, per_user=2_000)
    both = Predictions(
        np.append(found.user_id, big.user_id + 10),
        np.append(found.label, big.label),
        np.append(found.score, big.score),
        np.append(found.timestamp_ms, big.timestamp_ms),
    )
    sign = np.where(both.user_id == 10, 1.0, -1.0).astype(np.float32)
    changed = replace(both, score=both.score + sign * both.label)
    assert paired_difference([changed], [both]).difference.value > 0


def test_delta_method_and_bootstrap_agree() -> None:
    second = [make_predictions(seed) for seed in range(2)]
    first = [better(make_predictions(seed + 10), 0.1) for seed in range(2)]
    delta = paired_difference(first, second)
    bootstrap = paired_difference(first, second, bootstrap_error)
    assert bootstrap.difference.value == pytest.approx(delta.difference.value)
    assert bootstrap.error_users == pytest.approx(delta.error_users, rel=0.1)
    assert bootstrap.error_seeds == delta.error_seeds


def test_equal_predictions_differ_by_nothing() -> None:
    found = paired_difference([make_predictions(0)], [make_predictions(0)])
    assert (found.difference.low, found.difference.value, found.difference.high) == (0, 0, 0)
    assert found.p_value == 1


def test_what_can_not_be_compared_is_refused() -> None:
    found = make_predictions(0)
    with pytest.raises(ValueError, match="timestamp_ms differs"):
        paired_difference([replace(found, timestamp_ms=found.timestamp_ms + 1)], [found])
    with pytest.raises(ValueError, match="same seeds of both, got 2 and 1"):
        paired_difference([found, found], [found])
    with pytest.raises(ValueError, match="same seeds of both, got 0 and 0"):
        paired_difference([], [])
    lonely = make_predictions(0, users=1)
    with pytest.raises(ValueError, match="at least 2 users with both labels, got 1"):
        paired_difference([lonely], [lonely])


def test_spread_over_seeds() -> None:
    spread = Spread.of([0.7, 0.8])
    assert (spread.mean, spread.std) == (pytest.approx(0.75), pytest.approx(math.sqrt(0.005)))
    assert math.isnan(Spread.of([0.7]).std)
    found = [make_predictions(seed, signal=1.0) for seed in range(2)]
    assert quality(found)["gauc"].values == tuple(user_aucs(one).gauc for one in found)
