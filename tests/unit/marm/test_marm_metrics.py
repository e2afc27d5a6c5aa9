"""Metrics against hand-computed values and double loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from marm.metrics import auc, gauc, log_loss, xauc


def slow_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    wins = pairs = 0.0
    for i in range(len(labels)):
        for j in range(len(labels)):
            if labels[i] > 0 >= labels[j]:
                pairs += 1
                wins += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
    return wins / pairs if pairs else math.nan


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([0, 1], [0.1, 0.2], 1.0),
        ([0, 1], [0.2, 0.1], 0.0),
        ([0, 1], [0.5, 0.5], 0.5),
        ([0, 1, 0, 1], [1, 2, 3, 4], 0.75),
        ([1, 0, 0, 1, 1], [3, 2, 1, 1, 2], 4 / 6),
    ],
)
def test_auc_by_hand(labels: list[int], scores: list[float], expected: float) -> None:
    assert auc(np.array(labels), np.array(scores)) == pytest.approx(expected)


@pytest.mark.parametrize("distinct", [2, 5, 1000])
def test_auc_equals_a_double_loop(distinct: int) -> None:
    rng = np.random.default_rng(distinct)
    for size in (3, 20, 60):
        labels = rng.integers(0, 2, size)
        scores = rng.integers(0, distinct, size) / 7
        np.testing.assert_allclose(auc(labels, scores), slow_auc(labels, scores))


@pytest.mark.parametrize("labels", [[], [1, 1], [0, 0, 0]])
def test_auc_of_one_class_is_unknown(labels: list[int]) -> None:
    assert math.isnan(auc(np.array(labels), np.zeros(len(labels))))


def test_gauc_by_hand() -> None:
    users = np.array([1, 2, 1, 2, 1, 3, 3])
    labels = np.array([1, 0, 0, 1, 0, 1, 1])
    scores = np.array([0.9, 0.3, 0.1, 0.2, 0.95, 0.1, 0.2])
    # User 1: 1 of 2 pairs, 3 samples. User 2: 0 of 1, 2 samples. User 3 has one class.
    assert gauc(users, labels, scores) == pytest.approx((3 * 0.5 + 2 * 0.0) / 5)


def test_gauc_equals_a_loop_over_users() -> None:
    rng = np.random.default_rng(4)
    users, labels = rng.integers(-5, 6, 300), rng.integers(0, 2, 300)
    scores = rng.integers(0, 20, 300)
    total = weight = 0.0
    for user in set(users.tolist()):
        own = users == user
        value = slow_auc(labels[own], scores[own])
        if not math.isnan(value):
            total, weight = total + own.sum() * value, weight + own.sum()
    assert gauc(users, labels, scores) == pytest.approx(total / weight)


def test_gauc_without_a_mixed_user_is_unknown() -> None:
    assert math.isnan(gauc(np.array([1, 2]), np.array([1, 0]), np.array([0.1, 0.2])))
    assert math.isnan(gauc(np.empty(0), np.empty(0), np.empty(0)))


def test_log_loss() -> None:
    labels, scores = np.array([1.0, 0.0]), np.array([0.8, 0.4])
    assert log_loss(labels, scores) == pytest.approx(-(math.log(0.8) + math.log(0.6)) / 2)
    certain = log_loss(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    assert certain == pytest.approx(-math.log(1e-7), rel=1e-6)
    assert math.isnan(log_loss(np.empty(0), np.empty(0)))


def test_xauc_of_perfect_reversed_and_constant_scores() -> None:
    values = np.arange(50.0)
    assert xauc(values, values * 3) == 1.0
    assert xauc(values, -values) == 0.0
    assert xauc(values, np.zeros(50)) == 0.5


def test_xauc_estimates_the_share_over_all_pairs() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 10, 60).astype(float)
    scores = values + rng.normal(0, 4, 60).round()
    wins = pairs = 0.0
    for i in range(60):
        for j in range(60):
            if values[i] > values[j]:
                pairs += 1
                wins += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
    assert xauc(values, scores) == pytest.approx(wins / pairs, abs=0.01)


def test_xauc_is_unknown_without_a_pair_that_differs() -> None:
    assert math.isnan(xauc(np.empty(0), np.empty(0)))
    assert math.isnan(xauc(np.array([1.0]), np.array([1.0])))
    assert math.isnan(xauc(np.full(5, 2.0), np.arange(5)))
