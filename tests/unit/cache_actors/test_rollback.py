"""Rolling back goes by what has served, not by numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cache_actors.registry import ModelRegistry, ModelRegistryError
from cache_actors.rollback import Rollback, find_rollback
from cache_actors.served_versions import SERVED_FILE, served_before

STAGE, VARIANT = "ranking", "default"


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    registry = ModelRegistry(tmp_path)
    for step in range(6):
        registry.publish(STAGE, VARIANT, {"w": torch.full((2,), float(step))}, {"step": step})
    return registry


def serve(registry: ModelRegistry, *versions: int) -> None:
    for version in versions:
        registry.note_served(STAGE, VARIANT, version)


@pytest.mark.parametrize(
    ("served", "current", "expected"),
    [
        ([], 3, []),
        ([3], 3, []),
        ([1, 2, 3], 3, [2, 1]),
        ([1, 2, 3, 2], 2, [1]),
        ([1, 2, 3, 2, 1], 1, []),
        ([5, 6, 5, 7], 7, [5, 6]),
        ([1, 2], 9, [2, 1]),
    ],
)
def test_what_served_before(served: list[int], current: int, expected: list[int]) -> None:
    assert served_before(served, current) == expected


def test_each_rollback_goes_one_further_back(registry: ModelRegistry) -> None:
    serve(registry, 1, 4, 4, 6)  # 2, 3 and 5 were never live
    assert find_rollback(registry, STAGE, VARIANT) == Rollback(6, 4)
    registry.pin(STAGE, VARIANT, 4)
    assert find_rollback(registry, STAGE, VARIANT) == Rollback(4, 1)  # even before servers follow
    serve(registry, 4)
    assert find_rollback(registry, STAGE, VARIANT) == Rollback(4, 1)
    registry.pin(STAGE, VARIANT, 1)
    with pytest.raises(ModelRegistryError, match=r"served before version 1; published are \[1, 2"):
        find_rollback(registry, STAGE, VARIANT)


def test_a_pin_forward_rolls_back_to_what_served(registry: ModelRegistry) -> None:
    serve(registry, 3)
    registry.pin(STAGE, VARIANT, 5)
    assert find_rollback(registry, STAGE, VARIANT) == Rollback(5, 3)


def test_a_refused_newest_version_is_not_what_serves(registry: ModelRegistry) -> None:
    serve(registry, 4, 5)  # 6 was refused
    assert find_rollback(registry, STAGE, VARIANT) == Rollback(5, 4)


def test_damaged_and_deleted_versions_are_passed_over(
    registry: ModelRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    serve(registry, 1, 2, 4, 5, 6)
    (tmp_path / STAGE / VARIANT / "00000005" / "model.safetensors").write_bytes(b"")
    registry.pin(STAGE, VARIANT, 2)
    assert registry.prune(STAGE, VARIANT, keep=2) == [1, 3, 4]
    registry.pin(STAGE, VARIANT, None)
    assert find_rollback(registry, STAGE, VARIANT) == Rollback(6, 2)
    assert "not rolling back to version 5" in caplog.text


def test_without_notes_it_is_the_older_version(registry: ModelRegistry, tmp_path: Path) -> None:
    assert find_rollback(registry, STAGE, VARIANT) == Rollback(6, 5)
    (tmp_path / STAGE / VARIANT / SERVED_FILE).write_text("{")
    assert registry.served(STAGE, VARIANT) == []
    assert find_rollback(registry, STAGE, VARIANT) == Rollback(6, 5)


def test_nothing_published_nothing_to_roll_back(tmp_path: Path) -> None:
    with pytest.raises(ModelRegistryError, match="no version of ranking/none is published"):
        find_rollback(ModelRegistry(tmp_path), STAGE, "none")


def test_notes_never_fail_and_stay_short(registry: ModelRegistry, tmp_path: Path) -> None:
    for version in range(1, 300):
        registry.note_served(STAGE, VARIANT, version)
    assert registry.served(STAGE, VARIANT) == list(range(200, 300))
    ModelRegistry(tmp_path / "none").note_served(STAGE, VARIANT, 1)
    assert not (tmp_path / "none").exists()
