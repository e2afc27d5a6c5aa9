"""Figures by day: closed at checkpoints, bounded, late events counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from train import daily
from train.collective import SingleWorker
from train.daily import OPEN_DAYS, DailyMetrics
from train.metrics_file import MetricsReport, write_metrics
from train.predictions import Predictions, day_of

TASK = ("like",)
ALONE = SingleWorker()


def batch(day: int, num_events: int = 20, seed: int = 0) -> Predictions:
    rng = np.random.default_rng([seed, day])
    arrays = {
        "user_ids": rng.integers(0, 50, num_events),
        "days": np.full(num_events, day, np.int32),
        "labels": rng.integers(0, 2, (num_events, 1)).astype(np.float32),
        "scores": rng.random((num_events, 1)).astype(np.float32),
    }
    return Predictions.from_arrays(TASK, arrays)


def test_a_day_is_one_of_utc_and_a_wrong_clock_stays_a_day() -> None:
    stamps = np.array([0, 86_399_999, 86_400_000, -1, 2**62], np.int64)
    assert day_of(stamps).tolist() == [0, 0, 1, -1, 2**31 - 1]


def test_the_days_touched_longest_ago_are_closed() -> None:
    metrics = DailyMetrics({"ranking": TASK})
    unclosed = DailyMetrics({"ranking": TASK})
    days = [3, 1_000_000, *range(4, 10)]  # one of them far ahead
    for step, day in enumerate(days):
        metrics.add("ranking", batch(day), step)
        unclosed.add("ranking", batch(day), step)
        metrics.close_idle(ALONE)
        assert metrics.num_open_events() <= 20 * OPEN_DAYS
    assert sorted(metrics.rows) == [3, 4, 5, 1_000_000]
    assert repr(metrics.table(ALONE)) == repr(unclosed.table(ALONE))  # NaN is unlike itself
    assert list(metrics.closed()) == ["1970-01-04", "1970-01-05", "1970-01-06", "4707-11-29"]
    row = metrics.table(ALONE)["1970-01-04"]
    assert row == {"user_share": 1.0, "stages": {"ranking": batch(3).summarize()}}


def test_events_of_a_closed_day_are_counted_once() -> None:
    metrics = DailyMetrics({"ranking": TASK, "cascading": TASK})
    for stage in ("ranking", "cascading"):
        for day in range(OPEN_DAYS + 1):
            metrics.add(stage, batch(day), day)
    metrics.close_idle(ALONE)
    before = metrics.table(ALONE)
    for stage in ("ranking", "cascading"):
        metrics.add(stage, batch(0, 7), 99)
    assert metrics.late_events == 7
    assert repr(metrics.table(ALONE)) == repr(before)


def test_of_a_large_day_a_share_of_the_users_is_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daily, "MAX_DAY_EVENTS", 100)
    parts = [batch(1, 40, seed) for seed in range(10)]
    metrics, resumed = DailyMetrics({"ranking": TASK}), DailyMetrics({"ranking": TASK})
    for step, part in enumerate(parts):
        metrics.add("ranking", part, step)
        if step == 6:
            resumed.extend(metrics.state())
        elif step > 6:
            resumed.add("ranking", part, step)
    (row,) = metrics.table(ALONE).values()
    assert row["user_share"] in (0.25, 0.125)
    assert 0 < metrics.num_open_events() <= 100
    assert resumed.table(ALONE) == metrics.table(ALONE)
    kept = set(metrics.state()["ranking"]["user_ids"].tolist())
    every = np.concatenate([part.arrays()["user_ids"] for part in parts])
    assert len(metrics.state()["ranking"]["user_ids"]) == np.isin(every, list(kept)).sum()


def test_only_the_newest_days_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daily, "MAX_DAYS", 2)
    metrics = DailyMetrics({"ranking": TASK})
    for day in range(OPEN_DAYS + 5):
        metrics.add("ranking", batch(day), day)
    metrics.close_idle(ALONE)
    assert sorted(metrics.rows) == [3, 4]


def test_the_file_is_valid_json_whatever_is_unknown(tmp_path: Path) -> None:
    metrics = DailyMetrics({"ranking": TASK})
    metrics.add("ranking", batch(1, 1), 0)  # one event has no AUC
    report = MetricsReport((1, 2), {"ranking": {"like": {"auc": 0.5}}}, metrics.table(ALONE), 3)
    write_metrics(tmp_path / "metrics.json", report)
    read = json.loads((tmp_path / "metrics.json").read_text())
    assert read["evaluated_ms"] == [1, 2]
    assert read["total"] == {"ranking": {"like": {"auc": 0.5}}}
    assert read["days"]["1970-01-02"]["stages"]["ranking"]["like"]["auc"] is None
    assert read["late_events"] == 3
