"""What a training configuration refuses, and that it survives JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from sample_events import small_config

from marm.memory import Namespace
from train.config import TrainConfig, three_stages, with_errors

BASE = TrainConfig()
RANKING, CASCADING, RETRIEVAL = three_stages(small_config(), 3, 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": ()}, r"distinct stages of .*, got \[\]"),
        ({"models": (RANKING, RANKING)}, "distinct stages .* got .*'ranking', 'ranking'"),
        ({"models": (CASCADING, RANKING)}, "ranking model must come first, got"),
        (
            {"models": (RANKING, small_config("cascading", namespace=Namespace(dim=4)))},
            "same memory namespace",
        ),
        (
            {"models": (RANKING, replace(CASCADING, error_layers=1))},
            "layers of errors must be the same for all: set the same error_layers",
        ),
        (
            {
                "models": (
                    replace(RANKING, error_layers=2),
                    replace(CASCADING, error_layers=2, features=("item",)),
                )
            },
            "the feature tag for all or for none; got states of the widths",
        ),
        ({"writer": "popularity"}, "writer must be one of .* got 'popularity'"),
        ({"models": (RANKING, CASCADING), "writer": "cascading"}, "that writes must come first"),
        (
            {"models": (replace(CASCADING, depth=1),), "writer": "cascading"},
            "the cascading model writes the rows it computes",
        ),
        (
            {"models": (replace(RETRIEVAL, num_user_vectors=2),), "writer": "retrieval"},
            "needs error_layers=0 and num_user_vectors=1, got 0 and 2",
        ),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": 0}, "num_workers must be at least 1, got 0"),
        ({"num_threads": -1}, "num_threads must be at least 1, got -1"),
        ({"metrics_window": 0}, "metrics_window must be at least 1, got 0"),
        ({"checkpoint_every_steps": 0}, "checkpoint_every_steps must be at least 1, got 0"),
        ({"keep_versions": 0}, "keep_versions must be at least 1, got 0"),
        ({"publish_every_steps": -1}, "publish_every_steps must be at least 0, got -1"),
        ({"dense_learning_rate": 0.0}, "dense_learning_rate must be positive, got 0.0"),
        ({"sparse_learning_rate": float("nan")}, "sparse_learning_rate must be positive, got nan"),
        ({"follow_poll_s": 0.0}, "follow_poll_s must be positive, got 0.0"),
        ({"publish_interval_s": -1.0}, "publish_interval_s must be at least 0, got -1.0"),
        ({"caught_up_interval_s": float("nan")}, "caught_up_interval_s must be at least 0"),
        ({"evaluation_fraction": 1.1}, r"evaluation_fraction must be in \[0, 1\], got 1.1"),
        ({"evaluation_fraction": -0.1}, r"evaluation_fraction must be in \[0, 1\], got -0.1"),
        ({"device": "tpu"}, "device must be 'cpu' or 'cuda', got 'tpu'"),
        ({"precision": "fp16"}, "precision must be 'fp32' or 'bf16', got 'fp16'"),
        ({"variant": "Bad Name"}, "variant must match .* got 'Bad Name'"),
        ({"variant": "../up"}, "variant must match .* got '../up'"),
        ({"variant": ""}, "variant must match .* got ''"),
    ],
)
def test_what_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(BASE, **settings)


def test_a_configuration_survives_json() -> None:
    config = TrainConfig(
        models=(RANKING, CASCADING, RETRIEVAL),
        variant="b-2.x",
        batch_size=7,
        follow=True,
        idle_timeout_s=2.5,
        precision="bf16",
    )
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert TrainConfig.from_dict({}) == BASE


def test_unknown_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"unknown training settings \['magic'\].*batch_size"):
        TrainConfig.from_dict({"magic": 1})
    with pytest.raises(ValueError, match=r"unknown model settings \['magic'\]"):
        TrainConfig.from_dict({"models": [{"magic": 1}]})


def test_three_stages_share_the_memory_of_the_ranking_model() -> None:
    assert [model.stage for model in (RANKING, CASCADING, RETRIEVAL)] == [
        "ranking",
        "cascading",
        "retrieval",
    ]
    assert [model.history_length for model in (RANKING, CASCADING, RETRIEVAL)] == [10, 3, 7]
    config = TrainConfig(models=(RANKING, CASCADING, RETRIEVAL))
    assert config.history_length == 10
    assert config.namespace == RANKING.namespace
    assert config.writes_memory
    assert not TrainConfig(models=(CASCADING, RETRIEVAL)).writes_memory
    assert TrainConfig(models=(CASCADING, RETRIEVAL), writer="cascading").writes_memory
    assert not TrainConfig(models=(CASCADING,), writer="retrieval").writes_memory


def test_a_memory_of_errors_has_a_name_of_its_own() -> None:
    kept = with_errors(RANKING, 2)
    assert kept.error_layers == RANKING.depth == 2
    assert kept.namespace.name != RANKING.namespace.name  # rows of one are nothing to the other
    assert with_errors(RANKING, 1).namespace.name != kept.namespace.name
    assert with_errors(RANKING, 0) == RANKING
    with pytest.raises(ValueError, match="as many stored layers"):
        with_errors(RANKING, 3)


def test_two_layers_hold_errors_where_rows_can() -> None:
    assert with_errors(RANKING) == with_errors(RANKING, 2)
    deep = small_config(namespace=Namespace(depth=4, dim=8, dtype="float32"))
    assert with_errors(deep) == with_errors(deep, 2)
    flat = small_config(namespace=Namespace(depth=0, dim=8))
    int8 = replace(RANKING, namespace=replace(RANKING.namespace, dtype="int8"))
    for model in (flat, int8, replace(RANKING, tasks=("click",))):
        assert with_errors(model) == model
    stages = three_stages(with_errors(RANKING))
    assert [model.error_layers for model in stages] == [2, 2, 2]
    without_memory = replace(stages[1], depth=0, error_layers=0)
    assert TrainConfig(models=(stages[0], without_memory)).models[1].depth == 0
