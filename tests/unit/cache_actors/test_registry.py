from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cache_actors.registry import ModelRegistry, ModelRegistryError

STAGE, VARIANT = "retrieval", "marm-l2"


def publish(registry: ModelRegistry, step: int = 0, variant: str = VARIANT) -> int:
    return registry.publish(
        STAGE,
        variant,
        {"w": torch.full((2, 3), float(step)), "b": np.arange(4, dtype=np.int64)},
        {"step": step, "model": {"depth": 2}},
        {"items": {"item_id": np.arange(5), "vectors": np.ones((5, 2), np.float32)}},
    )


def test_what_was_published_is_loaded(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path)
    assert (publish(registry, 10), publish(registry, 20)) == (1, 2)
    model = ModelRegistry(tmp_path).load(STAGE, VARIANT, 2)
    assert (model.stage, model.variant, model.version) == (STAGE, VARIANT, 2)
    assert model.path == tmp_path / STAGE / VARIANT / "00000002"
    assert model.config["step"] == 20
    assert model.config["version"] == 2
    assert model.config["created_ms"] > 0
    assert torch.equal(model.tensors["w"], torch.full((2, 3), 20.0))
    assert model.tensors["b"].tolist() == [0, 1, 2, 3]
    assert model.items["item_id"].tolist() == [0, 1, 2, 3, 4]
    assert model.items["vectors"].dtype == np.float32
    assert registry.versions(STAGE, VARIANT) == [1, 2]
    assert registry.latest(STAGE, VARIANT) == 2
    assert registry.variants(STAGE) == [VARIANT]


def test_a_version_says_of_itself_what_its_publisher_said(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path)
    weights = {"w": np.zeros(2, np.float32)}
    told = registry.publish(STAGE, VARIANT, weights, {"newest_event_ms": 1_700_000_000_000})
    silent = registry.publish(STAGE, VARIANT, weights, {})
    assert registry.load(STAGE, VARIANT, told).newest_event_ms == 1_700_000_000_000
    assert registry.load(STAGE, VARIANT, silent).newest_event_ms is None
    (tmp_path / STAGE / VARIANT / "00000001" / "model.safetensors").unlink()
    assert registry.config(STAGE, VARIANT, told)["newest_event_ms"] == 1_700_000_000_000
    with pytest.raises(ModelRegistryError, match="is missing"):
        registry.config(STAGE, VARIANT, 9)


def test_every_kind_of_tensor_survives(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path)
    weight = torch.nn.Parameter(torch.randn(4, 4))
    tensors = {
        "tied_a": weight,
        "tied_b": weight,
        "transposed": weight.T,
        "half": weight.to(torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "nothing": torch.empty(0, 4),
    }
    version = registry.publish("ranking", "x", tensors, {})
    loaded = registry.load("ranking", "x", version)
    assert loaded.items == {}
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor.detach())


def test_an_empty_registry_has_nothing(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path / "absent")
    assert registry.versions(STAGE, VARIANT) == []
    assert registry.latest(STAGE, VARIANT) is None
    assert registry.latest_loadable(STAGE, VARIANT) is None
    assert registry.variants(STAGE) == []
    with pytest.raises(ModelRegistryError, match="00000001 is missing"):
        registry.load(STAGE, VARIANT, 1)
    with pytest.raises(ModelRegistryError, match="is missing"):
        registry.pin(STAGE, VARIANT, 1)


def lose_config(path: Path) -> None:
    (path / "config.json").unlink()


def tear_config(path: Path) -> None:
    config = path / "config.json"
    config.write_text(config.read_text()[:-20])


def edit_config(path: Path) -> None:
    config = path / "config.json"
    config.write_text(config.read_text().replace('"depth": 2', '"depth": 3'))


def write_another_document(path: Path) -> None:
    (path / "config.json").write_text("[1, 2]")


def point_outside(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config["files"]["../00000001/model.safetensors"] = config["files"]["model.safetensors"]
    (path / "config.json").write_text(json.dumps(config))


def lose_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def tear_weights(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def flip_a_weight(path: Path) -> None:
    weights = path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def tear_items(path: Path) -> None:
    (path / "items.safetensors").write_bytes(b"")


def take_from_version_1(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.parent / "00000001", path)


def replace_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("oops")


DAMAGES = [
    (lose_config, r"00000002 is half-written: .*config\.json"),
    (tear_config, r"config\.json is not JSON"),
    (edit_config, r"config\.json was changed"),
    (write_another_document, r"config\.json lists no files"),
    (point_outside, r"config\.json lists no files"),
    (lose_weights, r"model\.safetensors can't be read"),
    (tear_weights, r"model\.safetensors is torn: expected \d+ bytes"),
    (flip_a_weight, r"model\.safetensors is damaged"),
    (tear_items, r"items\.safetensors is torn"),
    (take_from_version_1, r"holds \('retrieval', 'marm-l2', 1\), expected"),
    (replace_by_file, r"00000002 is missing"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_a_damaged_version_is_refused_and_the_one_before_served(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    registry = ModelRegistry(tmp_path)
    publish(registry, 1)
    publish(registry, 2)
    damage(tmp_path / STAGE / VARIANT / "00000002")
    with pytest.raises(ModelRegistryError, match=reason):
        registry.load(STAGE, VARIANT, 2)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            model = registry.latest_loadable(STAGE, VARIANT)
            assert model is not None
            assert model.version == 1
    assert len(caplog.records) == 1
    assert "skipping retrieval/marm-l2 version 2: " in caplog.text
    assert publish(registry, 3) == 3
    newest = registry.latest_loadable(STAGE, VARIANT)
    assert newest is not None
    assert newest.version == 3


def test_a_repaired_version_is_served_again(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path)
    publish(registry)
    weights = tmp_path / STAGE / VARIANT / "00000001" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    assert registry.latest_loadable(STAGE, VARIANT) is None
    weights.write_bytes(content)
    assert registry.latest_loadable(STAGE, VARIANT) is not None


def test_a_reader_is_not_given_what_it_has(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path)
    publish(registry)
    assert registry.latest_loadable(STAGE, VARIANT, current=1) is None
    publish(registry)
    newer = registry.latest_loadable(STAGE, VARIANT, current=1)
    assert newer is not None
    assert newer.version == 2


def test_a_pin_rolls_back_until_it_is_taken_off(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path)
    for step in range(3):
        publish(registry, step)
    registry.pin(STAGE, VARIANT, 2)
    publish(registry, 4)
    other = ModelRegistry(tmp_path)
    assert other.pinned(STAGE, VARIANT) == other.latest(STAGE, VARIANT) == 2
    model = other.latest_loadable(STAGE, VARIANT, current=4)
    assert model is not None
    assert model.version == 2
    tear_weights(tmp_path / STAGE / VARIANT / "00000002")
    older = other.latest_loadable(STAGE, VARIANT)  # never a newer one than the pin
    assert older is not None
    assert older.version == 1
    registry.pin(STAGE, VARIANT, None)
    assert other.pinned(STAGE, VARIANT) is None
    assert other.latest(STAGE, VARIANT) == 4
    registry.pin(STAGE, VARIANT, None)


def test_a_pin_that_could_not_be_served_is_refused(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path)
    publish(registry)
    tear_weights(tmp_path / STAGE / VARIANT / "00000001")
    with pytest.raises(ModelRegistryError, match="torn"):
        registry.pin(STAGE, VARIANT, 1)
    assert registry.pinned(STAGE, VARIANT) is None


def test_a_damaged_pin_is_an_error_not_a_roll_forward(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path)
    publish(registry)
    (tmp_path / STAGE / VARIANT / "pin.json").write_text("{")
    with pytest.raises(ModelRegistryError, match=r"pin\.json must hold"):
        registry.latest(STAGE, VARIANT)


def test_prune_keeps_the_newest_and_the_pinned(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path)
    for step in range(6):
        publish(registry, step)
    registry.pin(STAGE, VARIANT, 2)
    assert registry.prune(STAGE, VARIANT, keep=2) == [1, 3, 4]
    assert registry.versions(STAGE, VARIANT) == [2, 5, 6]
    assert registry.prune(STAGE, VARIANT, keep=9) == []
    assert publish(registry) == 7
    with pytest.raises(ValueError, match="keep must be at least 1"):
        registry.prune(STAGE, VARIANT, keep=0)


def test_concurrent_publishers_get_their_own_versions(tmp_path: Path) -> None:
    got: list[tuple[int, int]] = []

    def run(publisher: int) -> None:
        registry = ModelRegistry(tmp_path)
        for turn in range(5):
            step = 100 * publisher + turn
            got.append((publish(registry, step), step))

    publishers = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for publisher in publishers:
        publisher.start()
    for publisher in publishers:
        publisher.join()
    registry = ModelRegistry(tmp_path)
    assert sorted(version for version, _ in got) == list(range(1, 21))
    for version, step in got:
        assert registry.load(STAGE, VARIANT, version).config["step"] == step
    assert len(list((tmp_path / STAGE / VARIANT).iterdir())) == 20


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "Upper", "sp ace"])
def test_names_that_are_not_plain_are_refused(tmp_path: Path, name: str) -> None:
    registry = ModelRegistry(tmp_path)
    with pytest.raises(ValueError, match="must match"):
        publish(registry, variant=name)
    with pytest.raises(ValueError, match="must match"):
        registry.load(name, VARIANT, 1)
    with pytest.raises(ValueError, match="must match"):
        registry.publish(STAGE, VARIANT, {}, {}, {name: {}})
    assert registry.versions(STAGE, VARIANT) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"stage": "ranking"}, "config says stage 'ranking', but 'retrieval'"),
        ({"loss": float("nan")}, "plain JSON without NaN"),
        ({"path": Path("x")}, "plain JSON"),
    ],
)
def test_configs_that_would_mislead_are_refused(tmp_path: Path, config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelRegistry(tmp_path).publish(STAGE, VARIANT, {}, config)


def test_a_failed_publish_leaves_nothing(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path)
    with pytest.raises(ValueError, match="is taken by the model"):
        registry.publish(STAGE, VARIANT, {"w": torch.ones(1)}, {}, {"model": {"x": np.ones(1)}})
    with pytest.raises(ValueError, match="'items'/'title' must be numbers"):
        registry.publish(STAGE, VARIANT, {}, {}, {"items": {"title": np.array(["a"])}})
    assert list((tmp_path / STAGE / VARIANT).iterdir()) == []
    assert json.dumps(registry.versions(STAGE, VARIANT)) == "[]"
