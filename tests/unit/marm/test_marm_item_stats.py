"""Item statistics against counting in a loop."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from marm.item_stats import PRIOR_STRENGTH, ItemStats


def test_means_equal_a_loop_with_unknown_labels_left_out() -> None:
    rng = np.random.default_rng(0)
    stats = ItemStats(num_slots=6, num_tasks=2)
    seen: dict[tuple[int, int], list[float]] = defaultdict(list)
    exposures = [0] * 6
    for _ in range(5):
        slots = rng.integers(0, 5, 12)  # slot 5 is never shown
        targets = rng.random((12, 2)).astype(np.float32)
        targets[rng.random((12, 2)) < 0.3] = np.nan
        stats.update(torch.from_numpy(slots), torch.from_numpy(targets))
        for slot, row in zip(slots, targets, strict=True):
            exposures[slot] += 1
            for task in range(2):
                if not math.isnan(row[task]):
                    seen[int(slot), task].append(float(row[task]))
    overall = []
    for task in range(2):
        values = [v for slot in range(6) for v in seen[slot, task]]
        overall.append((sum(values) + 1) / (len(values) + 2))
    expected = [
        [
            (sum(seen[slot, task]) + PRIOR_STRENGTH * overall[task])
            / (len(seen[slot, task]) + PRIOR_STRENGTH)
            for task in range(2)
        ]
        for slot in range(6)
    ]
    means = stats.means(torch.arange(6))
    np.testing.assert_allclose(means.numpy(), expected, rtol=1e-5)
    assert means[5].tolist() == pytest.approx(overall)  # an unseen item is average
    assert stats.exposures.tolist() == exposures


def test_nothing_seen_is_a_half_for_everyone() -> None:
    stats = ItemStats(4, 3)
    assert stats.means(torch.tensor([0, 3])).tolist() == [[0.5] * 3] * 2


def test_all_unknown_counts_as_an_exposure_only() -> None:
    stats = ItemStats(4, 2)
    stats.update(torch.tensor([1, 1]), torch.full((2, 2), torch.nan))
    assert stats.exposures.tolist() == [0, 2, 0, 0]
    assert not stats.counts.any()
    assert torch.isfinite(stats.means(torch.arange(4))).all()


def test_no_events_change_nothing() -> None:
    stats = ItemStats(4, 2)
    before = {name: tensor.clone() for name, tensor in stats.state_dict().items()}
    stats.update(torch.empty(0, dtype=torch.int64), torch.empty(0, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in stats.state_dict().items())
    assert stats.means(torch.empty(0, dtype=torch.int64)).shape == (0, 2)


def test_log_frequency_is_a_smoothed_share_of_exposures() -> None:
    stats = ItemStats(4, 1)
    stats.update(torch.tensor([0, 0, 0, 2]), torch.zeros(4, 1))
    shares = torch.exp(stats.log_frequency(torch.arange(4)))
    np.testing.assert_allclose(shares.numpy(), np.array([4, 1, 2, 1]) / 8, rtol=1e-6)
    assert float(shares.sum()) == pytest.approx(1.0)


def test_totals_are_exact_beyond_float32() -> None:
    stats = ItemStats(1, 1)
    stats.total_counts.fill_(2.0**25)
    stats.total_sums.fill_(2.0**25)
    stats.update(torch.tensor([0]), torch.ones(1, 1))
    assert stats.total_counts.item() == stats.total_sums.item() == 2.0**25 + 1
