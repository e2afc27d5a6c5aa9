"""Metrics that take a fast path equal their plain references; samples do not depend on order."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from marm.metrics import auc, gauc
from train.collective import SingleWorker
from train.daily import DailyMetrics
from train.predictions import Predictions
from train.rank_sample import RankSample

SAMPLES = st.lists(
    st.tuples(
        st.sampled_from([-(2**62), -3, 0, 1, 5, 2**62]),
        st.booleans(),
        st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 1e-30, 0.25, 0.5, 1.0, math.inf]),
    ),
    max_size=60,
)


def gauc_by_user(user_ids: NDArray, labels: NDArray, scores: NDArray) -> float:
    """Eq. (10), user by user: the reference of `gauc`."""
    total = weight = 0.0
    for user in np.unique(user_ids):
        own = user_ids == user
        value = auc(labels[own], scores[own])
        if not math.isnan(value):
            total, weight = total + own.sum() * value, weight + own.sum()
    return total / weight if weight else math.nan


@given(samples=SAMPLES, dtype=st.sampled_from([np.float32, np.float64]))
@settings(max_examples=80, deadline=None)
def test_gauc_in_one_pass_equals_gauc_user_by_user(samples: list, dtype: type) -> None:
    users = np.array([user for user, _, _ in samples], np.int64)
    labels = np.array([label for _, label, _ in samples], np.float32)
    scores = np.array([score for _, _, score in samples], dtype)
    expected = gauc_by_user(users, labels, scores)
    assert gauc(users, labels, scores) == pytest.approx(expected, rel=1e-12, nan_ok=True)


@given(order=st.permutations(range(12)), cut=st.integers(0, 12), capacity=st.integers(1, 14))
@settings(max_examples=50, deadline=None)
def test_a_sample_does_not_depend_on_order_or_workers(
    order: list[int], cut: int, capacity: int
) -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 12).astype(np.uint64)
    ranks, among = rng.random((12, 2)), np.arange(12)
    whole = RankSample(capacity, 2)
    whole.add(hashes, ranks, among)
    parts = []
    for indices in (order[:cut], order[cut:]):
        part = RankSample(capacity, 2)
        for index in indices:
            one = slice(index, index + 1)
            if part.wants(hashes[one])[0]:
                part.add(hashes[one], ranks[one], among[one])
        parts.append(part)
    merged = RankSample(capacity, 2)
    for part in parts:
        merged.extend(part.state())
    for name, array in whole.state().items():
        np.testing.assert_array_equal(merged.state()[name], array)
    assert len(merged) == min(capacity, 12)


@given(order=st.permutations(range(10)), cuts=st.lists(st.integers(0, 10), max_size=3))
@settings(max_examples=30, deadline=None)
def test_figures_by_day_do_not_depend_on_batches(order: list[int], cuts: list[int]) -> None:
    rng = np.random.default_rng(1)
    users, days = rng.integers(0, 3, 10), rng.integers(0, 3, 10).astype(np.int32)
    labels = rng.integers(0, 2, (10, 1)).astype(np.float32)
    scores = rng.random((10, 1)).astype(np.float32)
    arrays = {"user_ids": users, "days": days, "labels": labels, "scores": scores}
    tables = []
    for parts in ([np.arange(10)], np.split(np.array(order), sorted(cuts))):
        daily = DailyMetrics({"ranking": ("like",)})
        for step, part in enumerate(parts):
            batch = {name: array[part] for name, array in arrays.items()}
            daily.add("ranking", Predictions.from_arrays(("like",), batch), step)
        tables.append(daily.table(SingleWorker()))
    assert repr(tables[0]) == repr(tables[1])  # NaN is unlike itself
