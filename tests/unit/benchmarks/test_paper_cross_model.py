"""A stage with a memory of its own writes and reads it; shared memories are ranking's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up_trials import make_dataset, plain_loop, small_config

from benchmarks.paper import cross_model
from benchmarks.paper.cross_model import configurations
from benchmarks.paper.datasets import Dataset
from benchmarks.paper.plan import CommonSettings
from benchmarks.paper.stage_figures import measure_cascading, measure_retrieval
from benchmarks.paper.stage_runs import paired_means, run_stages
from benchmarks.paper.trial import run_trial
from marm.ranking_metrics import recall_at_k
from train.config import TrainConfig

COMMON = CommonSettings(history_length=8, dim=8, batch_size=32)


def all_configurations(dataset: Dataset, depth: int = 2) -> dict[str, TrainConfig]:
    return configurations(small_config(COMMON, f"marm_l{depth}", dataset), 5, 7)


@pytest.mark.parametrize("stage", ["cascading", "retrieval"])
def test_a_stage_with_a_memory_of_its_own_equals_the_plain_loop(stage: str) -> None:
    dataset = make_dataset(320)
    config = all_configurations(dataset)[f"own {stage}"]
    assert config.namespace.family == stage
    assert config.writes_memory
    found = run_stages(dataset, config, "test").predictions
    assert list(found) == [stage]
    expected = plain_loop(dataset, config)[dataset.window("test")]
    np.testing.assert_array_equal(found[stage].score, expected)


def test_ranking_is_as_it_is_alone_and_memories_differ() -> None:
    dataset = make_dataset(320)
    configs = all_configurations(dataset)
    runs = {name: run_stages(dataset, config, "test") for name, config in configs.items()}
    alone = replace(configs["shared"], models=configs["shared"].models[:1])
    np.testing.assert_array_equal(
        runs["shared"].predictions["ranking"].score,
        run_trial(dataset, alone).windows["test"].score,
    )
    for stage in ("cascading", "retrieval"):
        scores = [
            runs[name].predictions[stage].score for name in ("shared", f"own {stage}", "none")
        ]
        for first, second in ((0, 1), (0, 2), (1, 2)):
            assert np.abs(scores[first] - scores[second]).max() > 1e-5


def test_without_layers_no_memory_matters() -> None:
    """At depth 0 a memory holds raw rows, whoever writes it."""
    dataset = make_dataset(320)
    configs = all_configurations(dataset, depth=0)
    runs = {name: run_stages(dataset, config, "test") for name, config in configs.items()}
    for stage in ("cascading", "retrieval"):
        expected = runs["none"].predictions[stage].score
        for name in ("shared", f"own {stage}"):
            np.testing.assert_array_equal(runs[name].predictions[stage].score, expected)


def test_figures_are_those_of_the_same_events() -> None:
    dataset = make_dataset(320)
    runs = [
        {name: run_stages(dataset, config, "test") for name, config in seeds.items()}
        for seeds in (all_configurations(dataset), all_configurations(dataset))
    ]
    retrieval, cascading = measure_retrieval(runs), measure_cascading(runs)
    ranks = runs[0]["shared"].ranks
    assert ranks is not None
    positive = (dataset.labels > 0) & dataset.test
    assert sorted(ranks.user_id.tolist()) == sorted(dataset.events.user_id[positive].tolist())
    figures = retrieval.figures
    assert figures["shared"]["recall@10"].mean == pytest.approx(
        recall_at_k(ranks.by_method["retrieval"], 10)
    )
    gap = retrieval.differences["shared less none"]["recall@10"]
    expected = figures["shared"]["recall@10"].mean - figures["none"]["recall@10"].mean
    assert gap.difference.value == pytest.approx(expected)
    assert len(gap.per_seed) == 2
    assert set(figures) == {"shared", "own", "none", "popularity", "item_to_item"}
    gauc = cascading.differences["own less none"]["gauc"].difference.value
    means = {name: of["gauc"].mean for name, of in cascading.figures.items()}
    assert gauc == pytest.approx(means["own"] - means["none"])
    assert 0 <= cascading.figures["shared"]["pairs_alike"].mean <= 1


def test_paired_means_are_of_users() -> None:
    user = np.array([1, 1, 2, 2, 3])
    first = [np.array([1.0, 1.0, 0.0, 1.0, 1.0])]
    same = paired_means(user, first, first)
    assert (same.difference.value, same.p_value, same.users) == (0.0, 1.0, 3)
    less = paired_means(user, first, [np.zeros(5)])
    assert less.difference.value == pytest.approx(0.8)
    assert less.difference.low < 0.8 < less.difference.high


def test_the_program_writes_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = "world:num_users=20,num_items=50,num_events=800"
    arguments = "--seeds 1 --depth 1 --history 8 --dim 8 --batch-size 64 --retrieval-history 8"
    cross_model.main(["--data", world, *arguments.split(), "--out", str(tmp_path)])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    (file,) = tmp_path.glob("cross_model-*.json")
    assert json.loads(file.read_text(encoding="utf-8")) == said
    assert set(said["cascading"]["figures"]) == {"shared", "own", "none"}
    assert set(said["retrieval"]["differences"]) == {
        "shared less none",
        "own less none",
        "shared less own",
    }
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}


def test_there_is_nothing_to_share_without_layers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cross_model.main(["--data", "world", "--depth", "0"])
    assert "at least 1" in capsys.readouterr().err
