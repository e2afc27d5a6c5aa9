"""What the training benchmark compares really computes what it says."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.paper.datasets import Dataset, last_part
from benchmarks.perf.training import PARTS, Settings, parse_options
from benchmarks.perf.training_cost.cost import CostSettings, measure_cost
from benchmarks.perf.training_cost.feed import (
    PHASES,
    Slice,
    StepClock,
    longest_users,
    newest_of_users,
)
from benchmarks.perf.training_cost.fuxictr import (
    FuxictrSettings,
    by_log_loss_alone,
    ensure_venv,
    export,
    strict_predecessors,
)
from benchmarks.perf.training_cost.synthetic_users import BatchShape, MethodCase, RepeatedStep
from benchmarks.perf.training_cost.workers import limiting_reason
from marm.events import TASKS, EventBatch
from train.config import TrainConfig

SHAPE = BatchShape(num_users=3, events_per_user=2, dim=8, num_items=20)


pytestmark = pytest.mark.usefixtures("one_thread")


def dataset(users: list[int], timestamps_ms: list[int] | None = None) -> Dataset:
    count = len(users)
    stamps = np.arange(count) if timestamps_ms is None else np.array(timestamps_ms)
    labels = np.full((count, len(TASKS)), np.nan, np.float32)
    labels[: count - 1, TASKS.index("long_view")] = np.arange(count - 1) % 2
    zeros = np.zeros(count, np.int64)
    events = EventBatch(
        user_id=np.array(users) * 10**12,
        item_id=np.arange(count) * 7,
        timestamp_ms=stamps.astype(np.int64),
        event_key=np.arange(count).astype(np.uint64),
        author_id=zeros,
        tag_id=zeros + 5,
        duration_ms=zeros,
        context_id=zeros.astype(np.int32),
        labels=labels,
    )
    windows = last_part(count, count)
    return Dataset("made", events, **windows, features=("item",), feedback_signals=(), recency=())


def test_a_repeated_step_sees_full_histories_and_learns() -> None:
    step = RepeatedStep(SHAPE, MethodCase(history_length=9, depth=2), seed=0)
    inputs = step.build()
    assert len(inputs) == SHAPE.num_events
    # The later event of a user sees the earlier one, which pushes its oldest stored row out.
    block = inputs.block
    assert block is not None
    seen_B = inputs.slab.view.visible.sum(axis=1) + block.view.visible.sum(axis=1)
    assert seen_B.tolist() == [9] * SHAPE.num_events
    assert inputs.slab.memorised_BN.any()
    before = [parameter.detach().clone() for parameter in step.learner.model.net.parameters()]
    step.run()
    after = list(step.learner.model.net.parameters())
    assert not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_every_cost_figure_is_there() -> None:
    settings = replace(CostSettings.quick(), rounds=1)
    measured = measure_cost(settings)
    keys = {figure.key for part in measured for figure in part.figures}
    assert keys == {
        "cost_over_hstu",
        "cost_over_hstu_shared",
        "cost_over_din",
        "cost_over_din_shared",
        "cost_over_din_unit",
        "inputs_over_step",
        "cost_exponent",
    }
    assert all(value > 0 for part in measured for value in part.medians.values())


def test_the_feed_is_what_neither_predicts_nor_learns() -> None:
    elapsed = dict.fromkeys(PHASES, 0.0) | {"predict": 2.0, "learn": 5.0, "fetch": 4.0}
    one = Slice(10.0, 14.0, elapsed, elapsed)
    assert one.feed_fraction == pytest.approx(0.3)
    assert one.feed_cpu_fraction == pytest.approx(0.5)


def test_a_step_clock_counts_both_kinds_of_time() -> None:
    clock = StepClock()
    with clock.time("learn"):
        sum(range(1000))
    assert clock.elapsed_s["learn"] > 0
    assert clock.seconds()["learn"] > 0
    assert clock.elapsed_s["fetch"] == 0


def test_the_newest_events_of_every_user_are_kept_in_time_order() -> None:
    data = dataset([1, 2, 1, 1, 2, 3, 1])
    kept = newest_of_users(data.events, 2)
    assert kept.event_key.tolist() == [1, 3, 4, 5, 6]
    assert len(newest_of_users(data.events.take(slice(0, 0)), 2)) == 0


def test_long_histories_are_of_the_users_with_most_events() -> None:
    data = dataset([1, 2, 1, 1, 2, 3, 1])
    assert longest_users(data, 3).events.event_key.tolist() == [0, 2, 3, 6]
    assert longest_users(data, 5).events.event_key.tolist() == [0, 1, 2, 3, 4, 6]


def test_events_of_one_moment_are_not_each_others_past() -> None:
    users = np.array([4, 9, 4, 4, 9, 4])
    stamps = np.array([1, 2, 3, 3, 4, 5])
    assert strict_predecessors(users, stamps).tolist() == [0, 0, 1, 1, 1, 3]
    assert strict_predecessors(users[:0], stamps[:0]).tolist() == []


def test_exported_events_are_numbered_from_one(tmp_path: Path) -> None:
    export(dataset([8, 3, 8, 5]), tmp_path / "events.npz")
    with np.load(tmp_path / "events.npz") as columns:
        assert columns["user"].tolist() == [3, 1, 3, 2]
        assert columns["item"].tolist() == [1, 2, 3, 4]
        assert columns["tag"].tolist() == [1, 1, 1, 1]
        assert columns["label"].tolist() == [0, 1, 0, -1]
        assert columns["past"].tolist() == [0, 0, 1, 0]


def test_an_installed_environment_is_used_as_it_is(tmp_path: Path) -> None:
    settings = FuxictrSettings()
    stamp = json.dumps([settings.fuxictr, settings.torch])
    (tmp_path / "fuxictr-installed.json").write_text(stamp, encoding="utf-8")
    assert ensure_venv(tmp_path, settings) == tmp_path / "bin" / "python"


def test_two_workers_have_a_target_where_cores_are_free() -> None:
    assert limiting_reason(cpus=8, load=1.0, num_shards=1) is None
    reason = limiting_reason(cpus=2, load=0.0, num_shards=1)
    assert reason is not None
    assert "2 CPUs" in reason


def test_the_command_line_names_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse_options(["--only", "feed,cost", "--data", "log.parquet"])
    assert options.only == ["feed", "cost"]
    whole = parse_options([])
    assert (whole.data, whole.only) == ("world", list(PARTS))
    assert parse_options(["--quick"]).only == ["cost", "feed", "workers"]
    for wrong, message in (
        (["--only", "speed"], "no part 'speed'; they are cost, feed, workers, fuxictr"),
        (["--only", "cost", "--seeds", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            parse_options(wrong)
        assert message in capsys.readouterr().err
    assert isinstance(options, argparse.Namespace)


def test_only_the_loss_of_pairs_is_left_out() -> None:
    config = TrainConfig()
    plain = by_log_loss_alone(config)
    assert config.models[0].pairwise_weight > 0 == plain.models[0].pairwise_weight
    assert replace(plain.models[0], pairwise_weight=1.0) == replace(
        config.models[0], pairwise_weight=1.0
    )
    assert replace(plain, models=config.models) == config


def test_seeds_reach_both_sides() -> None:
    settings = Settings().seeded(range(3))
    assert settings.fuxictr.seeds == (0, 1, 2)
    assert settings.cost.seed == 0
