"""Rows of unchanged weights don't drift; a memory that lags is one without its newest vectors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up_trials import make_dataset, nothing, small_config
from numpy.typing import NDArray

from benchmarks.paper import drift
from benchmarks.paper.datasets import Dataset
from benchmarks.paper.memory_lag import NO_VECTORS, LaggingMemory, without_vectors
from benchmarks.paper.plan import CommonSettings
from benchmarks.paper.row_drift import age_edges, distinct_users, measure_drift
from benchmarks.paper.trial import Pass, run_pass
from benchmarks.paper.watched_pass import Piece, ask, first_of, run_watched
from marm.memory import RAW_STEP
from marm.memory_arrays import ArrayMemory
from marm.sequence import raw_rows
from train.config import TrainConfig

BATCH = 32
COMMON = CommonSettings(history_length=6, dim=8, batch_size=BATCH)


def config_of(name: str, dataset: Dataset) -> TrainConfig:
    return small_config(COMMON, name, dataset)


def run_of(dataset: Dataset, config: TrainConfig) -> Pass:
    return run_watched(dataset, config, ArrayMemory(config.namespace), len(dataset), nothing)


def watched_scores(dataset: Dataset, config: TrainConfig, lags: list[int]) -> dict[str, NDArray]:
    memory = ArrayMemory(config.namespace)
    lagging = LaggingMemory(memory, dataset.events.timestamp_ms, lags)
    done = run_watched(dataset, config, memory, first_of(dataset, "test"), lagging.watch)
    kept = dataset.window("test")
    found = {n: p.score for n, p in lagging.scores.predictions(dataset, "test").items()}
    return {"live": done.score_N[kept], **found}


def test_watching_a_pass_changes_nothing_in_it() -> None:
    dataset = make_dataset(num_users=8)
    config = config_of("marm_l2", dataset)
    expected = run_pass(dataset, config).score_N
    for since in (0, 100, len(dataset) - 1):
        memory = ArrayMemory(config.namespace)
        lagging = LaggingMemory(memory, dataset.events.timestamp_ms, [BATCH])
        done = run_watched(dataset, config, memory, since, lagging.watch)
        np.testing.assert_array_equal(done.score_N, expected)
        assert memory.num_rows == len(dataset)


@pytest.mark.parametrize("name", ["marm_l2", "marm_e_l2"])
def test_rows_of_weights_that_do_not_change_do_not_drift(name: str) -> None:
    dataset = make_dataset(num_users=8)
    config = replace(
        config_of(name, dataset), dense_learning_rate=1e-30, sparse_learning_rate=1e-30
    )
    ages = measure_drift(run_of(dataset, config), dataset, 50)
    assert [age.at_least for age in ages] == [0]
    assert ages[0].rows == 50
    # Errors are those of predictions that use item statistics, which are no weights and go on.
    first = config.models[0].error_layers
    for found in ages[0].layers.values():
        assert [layer.layer for layer in found] == [1, 2]
        for layer in found[first:]:
            assert layer.error_p95 < 2e-3  # of float16 rows
            assert layer.cosine_mean == pytest.approx(1.0, abs=1e-4)


def test_rows_of_weights_that_learn_drift_more_the_older_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.paper.row_drift._YOUNGEST", 60)
    dataset = make_dataset(num_users=8)
    config = replace(config_of("marm_l2", dataset), dense_learning_rate=3e-3)
    youngest, oldest = measure_drift(run_of(dataset, config), dataset, 40)
    assert (youngest.at_least, youngest.below, youngest.rows) == (0, 60, 40)
    assert (oldest.at_least, oldest.below, oldest.rows) == (60, 240, 40)
    for name in ("one_step", "rebuilt"):
        for layer in range(2):
            young, old = youngest.layers[name][layer], oldest.layers[name][layer]
            assert 0 < young.error_mean < old.error_mean
            assert old.cosine_mean < young.cosine_mean < 1


def test_rows_that_the_memory_lost_are_said() -> None:
    dataset = make_dataset(num_users=8)
    config = config_of("marm_l1", dataset)
    bounded = ArrayMemory(config.namespace, 2)
    done = run_watched(dataset, config, bounded, len(dataset), nothing)
    with pytest.raises(ValueError, match="give it no limit of rows"):
        measure_drift(done, dataset, 50)


def test_a_memory_without_vectors_is_one_of_raw_rows() -> None:
    """Slow reference: every event on its own, before a memory that holds nothing but raw rows."""
    dataset = make_dataset(96, 8)
    config = config_of("marm_l2", dataset)
    memory = ArrayMemory(config.namespace)
    lagging = LaggingMemory(memory, dataset.events.timestamp_ms, [BATCH])
    one_by_one: list[float] = []

    def watch(piece: Piece) -> None:
        lagging.watch(piece)
        for place in range(len(piece.events)):
            event = piece.events.take(slice(place, place + 1))
            past = dataset.events.take(slice(0, piece.start + place))
            raw = ArrayMemory(config.namespace)
            raw.save(past.user_id, raw_rows(past, config.namespace.row_dtype))
            before = raw.fetch(event.user_id, 6, event.timestamp_ms)
            inputs = piece.model.inputs.for_reading(event, before)
            one_by_one.append(float(ask(piece.model, inputs).score_B[0]))

    run_watched(dataset, config, memory, first_of(dataset, "test"), watch)
    found = lagging.scores.predictions(dataset, "test")[NO_VECTORS].score
    begin = first_of(dataset, "test") // BATCH * BATCH
    expected = np.array(one_by_one)[first_of(dataset, "test") - begin :]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_lag_of_everything_is_no_vectors_and_lags_differ() -> None:
    dataset = make_dataset(num_users=8)
    scores = watched_scores(dataset, config_of("marm_l2", dataset), [BATCH, 100, len(dataset)])
    np.testing.assert_array_equal(scores[str(len(dataset))], scores[NO_VECTORS])
    assert not np.array_equal(scores[str(BATCH)], scores[NO_VECTORS])
    assert not np.array_equal(scores[str(BATCH)], scores["100"])
    assert not np.array_equal(scores[str(BATCH)], scores["live"])


def test_without_layers_a_lag_changes_nothing() -> None:
    dataset = make_dataset(num_users=8)
    scores = watched_scores(dataset, config_of("marm_l0", dataset), [BATCH])
    np.testing.assert_allclose(scores[str(BATCH)], scores["live"], rtol=1e-5)
    np.testing.assert_array_equal(scores[NO_VECTORS], scores[str(BATCH)])


def test_rows_lose_their_vectors_from_a_time_on() -> None:
    dataset = make_dataset(64, 8)
    config = config_of("marm_l1", dataset)
    memory = ArrayMemory(config.namespace)
    run_watched(dataset, config, memory, len(dataset), nothing)
    users = np.unique(dataset.events.user_id)
    rows, cut_ms = memory.fetch(users, 64), int(dataset.events.timestamp_ms[40])
    changed = without_vectors(rows, cut_ms)
    newer = rows.rows["timestamp_ms"] >= cut_ms
    assert 0 < newer.sum() < len(newer)
    assert (changed.rows["written_step"][newer] == RAW_STEP).all()
    assert (changed.rows["memory"][newer] == 0).all()
    np.testing.assert_array_equal(changed.rows[~newer], rows.rows[~newer])
    assert (rows.rows["written_step"] != RAW_STEP).all()


def test_a_lag_of_nothing_is_refused() -> None:
    dataset = make_dataset(64, 8)
    memory = ArrayMemory(config_of("marm_l1", dataset).namespace)
    with pytest.raises(ValueError, match="at least 1 event"):
        LaggingMemory(memory, dataset.events.timestamp_ms, [0])


def test_ages_and_groups_cover_everything() -> None:
    assert age_edges(500) == [0, 500]
    assert age_edges(20_000) == [0, 1_024, 4_096, 16_384, 20_000]
    users = np.array([3, 1, 3, 3, 2, 1])
    groups = list(distinct_users(users, 2))
    assert sorted(np.concatenate(groups).tolist()) == list(range(6))
    for group in groups:
        assert len(group) <= 2
        assert len(set(users[group].tolist())) == len(group)
    assert list(distinct_users(np.empty(0, np.int64), 2)) == []


@pytest.mark.parametrize(("method", "program"), [("marm", "drift"), ("marm_e", "drift_marm_e")])
def test_the_program_writes_what_it_found(
    method: str, program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = "world:num_users=20,num_items=50,num_events=800"
    arguments = "--seeds 2 --depth 1 --history 8 --dim 8 --batch-size 64 --lags 64,256 --rows 20"
    drift.main(["--data", world, "--method", method, *arguments.split(), "--out", str(tmp_path)])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    (file,) = tmp_path.glob(f"{program}-*.json")
    assert said["method"] == f"{method}_l1"
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document == said
    assert list(document["gauc_by_memory_age"]) == ["live", "64", "256", "none"]
    assert document["gauc_by_memory_age"]["live"]["less_live"] is None
    assert len(document["gauc_by_memory_age"]["64"]["less_live"]["per_seed"]) == 2
    (age,) = document["drift"]
    assert (age["at_least"], age["below"], age["rows"]) == (0, 800, 40)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}


def test_nothing_drifts_without_layers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        drift.main(["--data", "world", "--depth", "0"])
    assert "at least 1" in capsys.readouterr().err
