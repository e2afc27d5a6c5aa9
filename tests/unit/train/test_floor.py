"""The floor against a loop that looks only backwards."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from sample_events import make_events, replaced

from cache_actors.event_log.log import EventLog
from marm.events import TASKS
from marm.item_stats import PRIOR_STRENGTH
from marm.metrics import auc, gauc
from train.floor import item_mean_floor, running_item_mean

COLUMN = TASKS.index("long_view")


def slow_means(items: np.ndarray, labels: np.ndarray) -> list[float]:
    scores, sums, counts, total = [], defaultdict(float), defaultdict(int), 0.0
    for position, (item, label) in enumerate(zip(items.tolist(), labels.tolist(), strict=True)):
        prior = (total + 1) / (position + 2)
        scores.append((sums[item] + PRIOR_STRENGTH * prior) / (counts[item] + PRIOR_STRENGTH))
        sums[item], counts[item], total = sums[item] + label, counts[item] + 1, total + label
    return scores


@pytest.mark.parametrize("num_items", [1, 3, 40])
def test_running_means_equal_a_loop(num_items: int) -> None:
    rng = np.random.default_rng(num_items)
    items, labels = rng.integers(-2, num_items, 120), rng.integers(0, 2, 120)
    np.testing.assert_allclose(running_item_mean(items, labels), slow_means(items, labels))


def test_a_prediction_never_sees_its_own_label_or_a_later_one() -> None:
    items, labels = np.array([1, 2, 1, 1, 2]), np.array([1, 0, 1, 0, 1])
    before = running_item_mean(items, labels)
    changed = labels.copy()
    changed[2:] = 1 - changed[2:]
    after = running_item_mean(items, changed)
    assert before[:3].tolist() == after[:3].tolist()
    assert before[3] != after[3]


def test_no_events() -> None:
    nothing = np.empty(0, np.int64)
    assert running_item_mean(nothing, nothing).shape == (0,)


def test_the_floor_of_a_log(tmp_path: Path) -> None:
    events = make_events(300, num_users=6)
    log = EventLog(tmp_path)
    log.append(events)
    from_ms = int(events.timestamp_ms[200])
    observed = ~np.isnan(events.labels[:, COLUMN])
    assert not observed.all()
    kept = events.take(observed)
    labels = kept.labels[:, COLUMN]
    scores = np.array(slow_means(kept.item_id, labels))
    late = kept.timestamp_ms >= from_ms
    assert item_mean_floor(log, "long_view", from_ms) == pytest.approx(
        {
            "auc": auc(labels[late], scores[late]),
            "gauc": gauc(kept.user_id[late], labels[late], scores[late]),
        }
    )


def test_items_that_differ_beat_chance_and_equal_items_do_not(tmp_path: Path) -> None:
    events = make_events(400)
    labels = events.labels.copy()
    labels[:, COLUMN] = events.item_id % 2
    log = EventLog(tmp_path)
    log.append(replaced(events, labels=labels))
    assert item_mean_floor(log, "long_view", int(events.timestamp_ms[200]))["auc"] > 0.95


@pytest.mark.parametrize("what", ["no events", "no label", "nothing to evaluate"])
def test_without_anything_to_evaluate_the_floor_is_unknown(tmp_path: Path, what: str) -> None:
    log, events = EventLog(tmp_path), make_events(20)
    if what == "no label":
        events = replaced(events, labels=np.full_like(events.labels, np.nan))
    if what != "no events":
        log.append(events)
    floor = item_mean_floor(log, "long_view", 1 << 60 if what == "nothing to evaluate" else 0)
    assert set(floor) == {"auc", "gauc"}
    assert all(math.isnan(value) for value in floor.values())
