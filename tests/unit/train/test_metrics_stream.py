"""Streaming metrics: independent of order and of workers, honest about what is unknown."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sample_events import make_events, replaced

from marm.events import TASKS, EventBatch
from marm.metrics import auc, gauc, log_loss
from train.metrics import EvaluationWindow, StreamingMetrics
from train.predictions import Predictions

TWO_TASKS = ("long_view", "watch_time")


def predictions_of(
    events: EventBatch, scores: np.ndarray, order: list[np.ndarray], tasks: tuple[str, ...]
) -> Predictions:
    predictions = Predictions(tasks)
    for part in order:
        predictions.add(events.take(part), scores[part])
    return predictions


def sample(num_tasks: int = 2) -> tuple[EventBatch, np.ndarray]:
    events = make_events(200)
    rng = np.random.default_rng(0)
    return events, (rng.integers(1, 9, (200, num_tasks)) / 10).astype(np.float32)


def test_figures_do_not_depend_on_order_or_on_who_predicted_what() -> None:
    events, scores = sample()
    rng = np.random.default_rng(1)
    straight = predictions_of(events, scores, [np.arange(200)], TWO_TASKS)
    shuffled = predictions_of(events, scores, np.split(rng.permutation(200), [7, 90]), TWO_TASKS)
    assert shuffled.summarize() == straight.summarize()
    evens = predictions_of(events, scores, [np.arange(0, 200, 2)], TWO_TASKS)
    evens.extend(predictions_of(events, scores, [np.arange(1, 200, 2)], TWO_TASKS))
    assert evens.summarize() == straight.summarize()
    assert len(evens) == 200


def test_the_figures_are_those_of_the_observed_labels() -> None:
    events, scores = sample()
    figures = predictions_of(events, scores, [np.arange(200)], TWO_TASKS).summarize()
    labels = events.labels[:, TASKS.index("long_view")]
    seen = ~np.isnan(labels)
    assert 0 < seen.sum() < 200
    expected = {
        "events": float(seen.sum()),
        "mean_label": float(labels[seen].mean()),
        "auc": auc(labels[seen], scores[seen, 0]),
        "gauc": gauc(events.user_id[seen], labels[seen], scores[seen, 0]),
        "log_loss": log_loss(labels[seen], scores[seen, 0]),
        "calibration": float(scores[seen, 0].mean() / labels[seen].mean()),
    }
    assert figures["long_view"] == pytest.approx(expected, rel=1e-5)
    watch = events.labels[:, TASKS.index("watch_time")]
    seen = ~np.isnan(watch)
    assert set(figures["watch_time"]) == {"events", "mean_label", "xauc", "mean_absolute_error_s"}
    error = float(np.abs(watch[seen] - scores[seen, 1]).mean())
    assert figures["watch_time"]["mean_absolute_error_s"] == pytest.approx(error, rel=1e-5)


def test_scores_that_are_no_probabilities_have_no_log_loss() -> None:
    events, scores = sample(1)
    figures = predictions_of(events, scores * 10 - 5, [np.arange(200)], ("long_view",)).summarize()
    assert set(figures["long_view"]) == {"events", "mean_label", "auc", "gauc"}


def test_a_task_without_observed_labels_is_left_out() -> None:
    events, scores = sample()
    labels = events.labels.copy()
    labels[:, TASKS.index("watch_time")] = np.nan
    events = replaced(events, labels=labels)
    figures = predictions_of(events, scores, [np.arange(200)], TWO_TASKS).summarize()
    assert set(figures) == {"long_view"}
    assert Predictions(TWO_TASKS).summarize() == {}


def test_one_class_has_no_auc_but_a_loss() -> None:
    events, scores = sample(1)
    labels = np.zeros_like(events.labels)
    events = replaced(events, labels=labels)
    (figures,) = predictions_of(events, scores, [np.arange(200)], ("like",)).summarize().values()
    assert math.isnan(figures["auc"])
    assert math.isnan(figures["gauc"])
    assert np.isfinite(figures["log_loss"])
    assert math.isnan(figures["calibration"])


def test_arrays_survive_a_round_trip_also_when_empty() -> None:
    events, scores = sample()
    full = predictions_of(events, scores, [np.arange(50), np.arange(50, 200)], TWO_TASKS)
    again = Predictions.from_arrays(TWO_TASKS, full.arrays())
    assert again.summarize() == full.summarize()
    empty = Predictions.from_arrays(TWO_TASKS, Predictions(TWO_TASKS).arrays())
    assert len(empty) == 0
    empty.extend(full)
    assert empty.summarize() == full.summarize()


def test_the_window_holds_everything_and_the_evaluation_the_end_of_the_log() -> None:
    events, scores = sample()
    metrics = StreamingMetrics(
        {"ranking": TWO_TASKS}, EvaluationWindow(int(events.timestamp_ms[150]), 1 << 62)
    )
    for part in np.split(np.arange(200), [30, 160]):
        metrics.add("ranking", events.take(part), scores[part])
    assert metrics.window_events() == 200
    assert len(metrics.evaluation["ranking"]) == 50
    late = predictions_of(events, scores, [np.arange(150, 200)], TWO_TASKS)
    assert metrics.evaluation["ranking"].summarize() == late.summarize()
    everything = predictions_of(events, scores, [np.arange(200)], TWO_TASKS)
    assert metrics.pop_window() == {"ranking": everything.summarize()}
    assert metrics.window_events() == 0
    assert metrics.pop_window() == {"ranking": {}}
    assert len(metrics.evaluation["ranking"]) == 50


def test_the_evaluation_ends_with_its_window() -> None:
    events, scores = sample()
    window = EvaluationWindow(int(events.timestamp_ms[20]), int(events.timestamp_ms[99]))
    metrics = StreamingMetrics({"ranking": TWO_TASKS}, window)
    metrics.add("ranking", events, scores)
    assert len(metrics.evaluation["ranking"]) == 80
