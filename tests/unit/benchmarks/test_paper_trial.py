"""A trial is the plain test-then-train loop, with any store; finished ones are not run again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up_trials import make_dataset, plain_loop, small_config
from sample_events import make_events, replaced

from benchmarks.paper import trial_pool
from benchmarks.paper.datasets import Dataset
from benchmarks.paper.phases import PHASES
from benchmarks.paper.plan import CommonSettings, parse_methods
from benchmarks.paper.trial import EventsInMemory, run_pass, run_trial
from benchmarks.paper.trial_cache import TrialCache
from benchmarks.paper.trial_pool import Trial, run_trials, write_dataset
from marm.memory import InProcessMemory
from marm.memory_arrays import ArrayMemory
from train.config import TrainConfig, three_stages

COMMON = CommonSettings(history_length=8, dim=8, batch_size=32)


def partly_labelled(num_events: int = 240) -> Dataset:
    dataset = make_dataset(num_events)
    labels = dataset.events.labels.copy()
    labels[::17] = np.nan
    return replace(dataset, events=replaced(dataset.events, labels=labels))


def config_of(name: str, dataset: Dataset, seed: int = 0) -> TrainConfig:
    return small_config(COMMON, name, dataset, seed)


@pytest.mark.parametrize("name", ["marm_l2", "sum_pooling"])
def test_a_trial_equals_the_plain_loop(name: str) -> None:
    dataset = partly_labelled()
    config = config_of(name, dataset)
    expected = plain_loop(dataset, config)
    result = run_trial(dataset, config)
    for window in ("test", "tuning"):
        kept, found = dataset.window(window), result.windows[window]
        np.testing.assert_array_equal(found.score, expected[kept])
        np.testing.assert_array_equal(found.user_id, dataset.events.user_id[kept])
        np.testing.assert_array_equal(found.timestamp_ms, dataset.events.timestamp_ms[kept])
        np.testing.assert_array_equal(found.label, dataset.labels[kept])
        assert not np.isnan(found.label).any()
    assert 0 < len(result.windows["test"]) < 48  # some labels were not observed


def test_predictions_do_not_depend_on_the_store() -> None:
    dataset = partly_labelled()
    config = config_of("marm_l2", dataset)
    stores = (
        InProcessMemory(config.namespace),
        ArrayMemory(config.namespace),
        ArrayMemory(config.namespace, config.history_length),
    )
    scores = [run_pass(dataset, config, store).score_N for store in stores]
    assert len(scores[0]) == len(dataset)
    np.testing.assert_array_equal(scores[1], scores[0])
    np.testing.assert_array_equal(scores[2], scores[0])


def test_rows_and_learning_show_in_the_predictions() -> None:
    """What the other tests compare is not constant: history, depth and seed all matter."""
    dataset = partly_labelled()
    scores = [
        run_pass(dataset, config_of(name, dataset, seed)).score_N
        for name, seed in (("marm_l0", 0), ("marm_l2", 0), ("marm_l2", 1))
    ]
    assert np.abs(scores[0] - scores[1]).max() > 1e-4
    assert np.abs(scores[1] - scores[2]).max() > 1e-4


def test_costs_are_counted() -> None:
    dataset = partly_labelled(64)
    cost = run_trial(dataset, config_of("marm_l1", dataset)).cost
    assert cost.num_events == 64
    assert tuple(cost.phases_s) == PHASES
    assert min(cost.phases_s.values()) >= 0
    assert cost.phases_s["learn"] > 0
    assert cost.events_per_s == pytest.approx(64 / cost.seconds)
    assert cost.events_per_cpu_s == pytest.approx(64 / cost.cpu_s)


def test_a_trial_is_of_one_ranking_model() -> None:
    dataset = partly_labelled(64)
    config = config_of("marm_l1", dataset)
    several = replace(config, models=three_stages(config.models[0]))
    with pytest.raises(ValueError, match="one ranking model that learns 'long_view' first"):
        run_trial(dataset, several)


def test_events_in_memory_come_once_and_in_order() -> None:
    events = make_events(10)
    source = EventsInMemory(events)
    parts = [source.next(4), source.next(4), source.next(4), source.next(4)]
    assert [None if part is None else len(part) for part in parts] == [4, 4, 2, None]
    assert parts[2] is not None
    assert parts[2].event_key.tolist() == events.event_key[8:].tolist()


def test_finished_trials_are_read_from_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = partly_labelled(96)
    methods = parse_methods("sum_pooling,marm_l1")
    trials = [Trial(one.name, config_of(one.name, dataset)) for one in methods]
    first = run_trials(dataset, trials[:1], tmp_path)  # as if interrupted after one
    capsys.readouterr()
    ran: list[int] = []

    def counted(dataset: Dataset, config: TrainConfig) -> object:
        ran.append(config.models[0].depth)
        return run_trial(dataset, config)

    monkeypatch.setattr(trial_pool, "run_trial", counted)
    both = run_trials(dataset, trials, tmp_path)
    assert ran == [1]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["sum_pooling", "marm_l1"]
    assert "from disk" in lines[0]
    assert "from disk" not in lines[1]
    assert both[0].settings == first[0].settings
    assert both[0].cost == first[0].cost
    np.testing.assert_array_equal(both[0].windows["test"].score, first[0].windows["test"].score)
    run_trials(dataset, trials, tmp_path)
    assert ran == [1]
    run_trials(dataset, [Trial("other seed", replace(trials[0].config, seed=1))], tmp_path)
    run_trials(dataset.first(80), trials[:1], tmp_path)
    assert ran == [1, 0, 0]
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        run_trials(dataset, trials, tmp_path, 0)


def test_a_worker_writes_what_this_process_computes(tmp_path: Path) -> None:
    dataset = partly_labelled(64)
    config = config_of("marm_l1", dataset)
    cache = TrialCache(tmp_path / "trials")
    path = cache.path(dataset.fingerprint(), config)
    file = write_dataset(dataset, tmp_path)
    assert trial_pool._run_and_write(file, config, path) == path
    found = cache.load(path)
    assert found is not None
    expected = run_trial(dataset, config)
    np.testing.assert_array_equal(found.windows["test"].score, expected.windows["test"].score)
    trial_pool._loaded.clear()
    with pytest.raises(RuntimeError, match="the code of a trial changed"):
        trial_pool._run_and_write(file, config, path.with_name("of-other-code.npz"))
    trial_pool._loaded.clear()


def test_other_settings_and_code_have_other_files(tmp_path: Path) -> None:
    dataset = partly_labelled(64)
    cache = TrialCache(tmp_path)
    configs = [config_of(name, dataset) for name in ("marm_l1", "marm_l2", "sum_pooling")]
    other_rate = 3 * configs[0].sparse_learning_rate
    configs.append(replace(configs[0], sparse_learning_rate=other_rate))
    paths = {cache.path("data", config) for config in configs}
    paths.add(cache.path("other data", configs[0]))
    assert len(paths) == 5
    assert cache.path("data", configs[0]) in paths
    assert cache.load(tmp_path / "nothing.npz") is None
