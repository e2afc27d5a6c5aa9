"""What a model configuration refuses, and that it survives JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from sample_events import small_config

from marm.config import STAGES, ModelConfig
from marm.events import TASKS
from marm.memory import Namespace
from marm.model_factory import build_model

BASE = ModelConfig()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": "rerank"}, r"stage must be one of .*'ranking'.*got 'rerank'"),
        ({"depth": -1}, "depth must be an integer of at least 0, got -1"),
        ({"depth": 1.5}, "depth must be an integer .* got 1.5"),
        ({"depth": True}, "depth must be an integer .* got True"),
        ({"depth": 3}, "depth must be at most the namespace's 2 .* got 3; lower it"),
        ({"depth": 1}, r"must equal the namespace's \(2, 32\), got \(1, 32\)"),
        ({"attention_dim": 16}, r"must equal the namespace's \(2, 32\), got \(2, 16\)"),
        ({"history_length": 0}, "history_length must be an integer of at least 1, got 0"),
        ({"attention_dim": 0}, "attention_dim .* got 0"),
        ({"feature_dim": 0}, "feature_dim .* got 0"),
        ({"num_heads": 0}, "num_heads .* got 0"),
        ({"num_heads": 5}, "must divide attention_dim, got 5 heads for a width of 32"),
        ({"num_slots": 0}, "num_slots .* got 0"),
        ({"num_experts": "3"}, "num_experts .* got '3'"),
        ({"expert_dim": 0}, "expert_dim .* got 0"),
        ({"output_dim": -3}, "output_dim .* got -3"),
        ({"tasks": ()}, "tasks must name at least one of .*click.*, got none"),
        ({"tasks": ("click", "rate")}, r"tasks must be distinct names of .* got \('click', 'rate'"),
        ({"tasks": ("click", "click")}, "tasks must be distinct"),
        ({"feedback_signals": ("watch_time",)}, "feedback_signals must be .* got"),
        ({"features": ("author",)}, r"features must include 'item', got \('author',\)"),
        ({"features": ("item", "colour")}, "features must be distinct names .*colour"),
        ({"recency": ("age",)}, "recency must be distinct names .*age"),
        ({"positive_task": "watch_time"}, "positive_task must be one of .* got 'watch_time'"),
    ],
)
def test_what_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(BASE, **settings)


def test_readers_may_be_shallower_and_narrower_than_the_memory() -> None:
    reader = replace(BASE, stage="cascading", depth=1, attention_dim=16)
    assert build_model(reader).config == reader


@pytest.mark.parametrize("stage", STAGES)
def test_a_configuration_survives_json(stage: str) -> None:
    config = small_config(
        stage,
        namespace=Namespace("other", 1, 4, "float32", 3, "like"),
        tasks=("like", "watch_time"),
        recency=(),
        features=("item", "tag"),
        feedback_signals=("like",),
        positive_task="like",
    )
    text = json.dumps(config.to_dict())
    assert ModelConfig.from_dict(json.loads(text)) == config
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_unknown_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"unknown model settings \['magic'\]; expected .*depth"):
        ModelConfig.from_dict({"magic": 1})
    with pytest.raises(ValueError, match="depth must be an integer"):
        ModelConfig.from_dict({**BASE.to_dict(), "depth": "2"})


def test_missing_settings_take_their_default() -> None:
    assert ModelConfig.from_dict({"namespace": {}}) == BASE
    assert BASE.tasks == TASKS


@pytest.mark.parametrize("stage", STAGES)
def test_weights_fit_a_model_built_from_the_stored_configuration(stage: str) -> None:
    torch.manual_seed(0)
    model = build_model(small_config(stage))
    stored = json.loads(json.dumps(model.config.to_dict()))
    again = build_model(ModelConfig.from_dict(stored))
    again.load_state_dict(model.state_dict())
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
