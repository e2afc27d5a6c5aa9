"""Which published version computes rows, and which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rebuild_samples import STEP, frozen_weights

from cache_actors.event_log.offsets import LogOffsets
from cache_actors.registry import ModelRegistry, ModelRegistryError
from train.rebuild.request import AuditRequest, RebuildRequest
from train.rebuild.weights import load_weights

WEIGHTS = frozen_weights()
OFFSETS = LogOffsets.at_segment(3)


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(tmp_path)


def publish(registry: ModelRegistry, **changes: Any) -> int:
    config = {
        "step": STEP,
        "model": WEIGHTS.config.to_dict(),
        "log_offsets": OFFSETS.to_dict(),
        **changes,
    }
    published = {name: value for name, value in config.items() if value is not None}
    return registry.publish("ranking", "default", WEIGHTS.tensors, published)


def test_the_version_that_serves_is_loaded_whole(registry: ModelRegistry) -> None:
    publish(registry, step=5)
    publish(registry)
    loaded = load_weights(registry, "default")
    assert (loaded.version, loaded.step, loaded.log_end) == (2, STEP, OFFSETS)
    assert loaded.config == WEIGHTS.config
    model = loaded.build()
    for name, tensor in model.state_dict().items():
        assert tensor.equal(WEIGHTS.tensors[name]), name
    assert not any(parameter.requires_grad for parameter in model.parameters())
    registry.pin("ranking", "default", 1)
    assert load_weights(registry, "default").version == 1
    assert load_weights(registry, "default", 2).step == STEP


def test_without_a_version_there_is_nothing_to_compute_with(registry: ModelRegistry) -> None:
    with pytest.raises(ModelRegistryError, match=r"variants: none\).*run `marm train` first"):
        load_weights(registry, "default")
    publish(registry)
    with pytest.raises(ModelRegistryError, match=r"'other' is published \(variants: default\)"):
        load_weights(registry, "other")
    with pytest.raises(ModelRegistryError, match="missing"):
        load_weights(registry, "default", 9)


def test_versions_that_cannot_compute_rows_are_refused(registry: ModelRegistry) -> None:
    publish(registry, step=None, log_offsets=None)
    with pytest.raises(ValueError, match=r"has no \['step', 'log_offsets'\]"):
        load_weights(registry, "default")
    publish(registry, model={**WEIGHTS.config.to_dict(), "stage": "cascading"})
    with pytest.raises(ValueError, match="is a cascading model; only a ranking model"):
        load_weights(registry, "default")
    broken = {**WEIGHTS.tensors, "table.weight": torch.full((512, 6), float("nan"))}
    config = {"step": 1, "model": WEIGHTS.config.to_dict(), "log_offsets": OFFSETS.to_dict()}
    registry.publish("ranking", "default", broken, config)
    with pytest.raises(ValueError, match=r"tensors \['table.weight'\] hold NaN"):
        load_weights(registry, "default")


@pytest.mark.parametrize(
    "settings",
    [
        {"limit_users": 0},
        {"newest": 0},
        {"num_workers": 0},
        {"older_than_steps": -1},
        {"user_ids": ()},
    ],
)
def test_requests_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        RebuildRequest(**settings)


def test_an_audit_needs_users() -> None:
    with pytest.raises(ValueError, match="num_users must be at least 1, got 0"):
        AuditRequest(num_users=0)


def test_a_request_says_which_rows_are_due() -> None:
    assert RebuildRequest().rule(100).oldest_step == 100
    assert RebuildRequest(older_than_steps=30).rule(100).oldest_step == 70
    assert RebuildRequest(older_than_steps=300).rule(100).oldest_step == 0
    assert RebuildRequest(older_than_steps=None).rule(100).oldest_step == 0
