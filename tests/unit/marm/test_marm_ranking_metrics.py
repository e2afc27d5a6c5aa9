"""Metrics of ordered lists against hand-computed values and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import kendalltau

from marm.ranking_metrics import ndcg_at_k, pair_agreement, ranks_of_true, recall_at_k, top_recall


def test_the_rank_counts_what_is_better_and_half_of_what_is_equal() -> None:
    scores = np.array([[0.9, 0.5, 0.5, 0.1], [0.9, 0.5, 0.5, 0.1]])
    allowed = np.array([[True] * 4, [False, True, True, True]])
    np.testing.assert_array_equal(ranks_of_true(np.array([0.5, 0.05]), scores, allowed), [3.0, 4.0])


def test_a_score_that_is_not_a_number_has_no_rank() -> None:
    scores = np.array([[math.nan, 1.0], [math.nan, 1.0], [0.0, 1.0]])
    allowed = np.array([[True, True], [False, True], [True, True]])
    ranks = ranks_of_true(np.array([0.5, 0.5, math.nan]), scores, allowed)
    np.testing.assert_array_equal(ranks, [math.nan, 2.0, math.nan])
    assert math.isnan(recall_at_k(ranks, 10))
    assert math.isnan(ndcg_at_k(ranks, 10))


def test_recall_and_ndcg_by_hand() -> None:
    ranks = np.array([1.0, 3.0, 10.0, 11.0])
    assert recall_at_k(ranks, 10) == 0.75
    expected = (1 + 1 / math.log2(4) + 1 / math.log2(11)) / 4
    assert ndcg_at_k(ranks, 10) == pytest.approx(expected)
    assert math.isnan(recall_at_k(np.empty(0), 10))
    assert math.isnan(ndcg_at_k(np.empty(0), 10))


def test_agreement_of_a_full_window_is_kendalls_tau() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, (1, 30)) / 7, rng.integers(0, 6, (1, 30)) / 7
    found = pair_agreement(a, b, np.ones((1, 30), np.bool_))
    assert found["pairs"] == 30 * 29 / 2
    assert found["kendall_tau"] == pytest.approx(kendalltau(a[0], b[0]).statistic)


def test_agreement_counts_pairs_of_filled_places_only() -> None:
    a = np.array([[1.0, 2.0, 3.0, 9.0], [1.0, 2.0, 9.0, 9.0]])
    b = np.array([[1.0, 3.0, 2.0, 0.0], [5.0, 5.0, 0.0, 0.0]])
    filled = np.array([[True, True, True, False], [True, True, False, False]])
    found = pair_agreement(a, b, filled)
    assert found["pairs"] == 4
    assert found["pairs_alike"] == (2 + 0.5) / 4
    assert found["kendall_tau"] == pytest.approx((2 - 1) / math.sqrt(4 * 3))
    nothing = pair_agreement(a[:, :1], b[:, :1], filled[:, :1])
    assert nothing["pairs"] == 0
    assert math.isnan(nothing["pairs_alike"])
    assert math.isnan(nothing["kendall_tau"])


def test_of_the_best_how_many_are_kept() -> None:
    a = np.array([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    b = np.array([[4.0, 1.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    assert top_recall(a, b, 1, 2) == 0.5
    assert top_recall(a, b, 2, 3) == pytest.approx((1 + 1) / 4)
    assert math.isnan(top_recall(a[:0], b[:0], 1, 2))
