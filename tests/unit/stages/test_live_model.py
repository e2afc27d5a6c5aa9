from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import pytest
import torch
from serving_models import InProcessReader as Reader
from serving_models import publish_model, wait_until

from cache_actors.registry import ModelRegistry
from marm.memory import Namespace
from stages import live_model
from stages.assemble import build_cascading, build_ranking, build_retrieval
from stages.live_model import LiveModel, versions_to_try

LOGGER = logging.getLogger("test-live")


@dataclass(frozen=True)
class Loaded:
    version: int


@pytest.fixture
def registry(tmp_path):
    return ModelRegistry(tmp_path / "models")


def follow(registry, stage="ranking", build=lambda published: Loaded(published.version)):
    return LiveModel(registry, stage, "default", build, LOGGER)


@pytest.mark.parametrize(
    ("published", "wanted", "live", "refused", "expected"),
    [
        ([], None, None, [], []),
        ([1, 2, 3], None, None, [], [3, 2, 1]),
        ([1, 2, 3], None, 2, [], [3]),
        ([1, 2, 3], None, 3, [], []),
        ([1, 2, 3], None, None, [3], [2, 1]),
        ([1, 2, 3], None, 2, [3], []),
        ([1, 2, 3], 1, 3, [], [1]),
        ([1, 2, 3], 1, 1, [], []),
        ([1, 2, 3], 1, 3, [1], []),
        ([1, 2], None, 3, [], []),
    ],
)
def test_versions_to_try(published, wanted, live, refused, expected):
    assert versions_to_try(published, wanted, live, refused) == expected


def test_nothing_published_is_said():
    live = follow(ModelRegistry("/nonexistent/models"))
    assert live.poll() is False
    assert live.current is None
    assert "run `marm train`" in live.problem


def test_newest_goes_live_and_stays_while_nothing_changes(registry):
    publish_model(registry, "ranking")
    live = follow(registry)
    assert live.poll() is True
    first = live.current
    assert (first.version, live.problem) == (1, "")
    assert live.poll() is False
    assert live.current is first
    publish_model(registry, "ranking", seed=1)
    assert live.poll() is True
    assert live.current.version == 2


def test_what_serves_says_up_to_when_it_has_learned(registry):
    live = follow(registry)
    assert live.newest_event_ms is None
    registry.publish("ranking", "default", {"w": torch.zeros(1)}, {"newest_event_ms": 1_000})
    registry.publish("ranking", "default", {"w": torch.zeros(1)}, {})
    registry.pin("ranking", "default", 1)
    live.poll()
    assert live.newest_event_ms == 1_000
    registry.pin("ranking", "default", None)
    live.poll()
    assert (live.current.version, live.newest_event_ms) == (2, None)


def test_a_damaged_version_is_refused_once_and_the_old_one_serves_on(registry, caplog):
    publish_model(registry, "ranking")
    live = follow(registry)
    live.poll()
    publish_model(registry, "ranking", seed=1)
    path = registry.load("ranking", "default", 2).path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with caplog.at_level(logging.ERROR, LOGGER.name):
        assert live.poll() is False
        assert live.poll() is False
    assert live.current.version == 1
    assert "version 2 was refused" in live.problem
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"{live.problem}; version 1 goes on serving"]
    publish_model(registry, "ranking", seed=2)
    assert live.poll() is True
    assert (live.current.version, live.problem) == (3, "")


def test_a_repaired_version_is_tried_again(registry, monkeypatch):
    publish_model(registry, "ranking")
    path = registry.load("ranking", "default", 1).path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(b"")
    live = follow(registry)
    live.poll()
    assert live.current is None
    path.write_bytes(content)
    assert live.poll() is False
    monkeypatch.setattr(live_model, "RETRY_REFUSED_S", 0.0)
    assert live.poll() is True
    assert (live.current.version, live.problem) == (1, "")


def test_pin_and_want_choose_the_version(registry):
    for seed in range(3):
        publish_model(registry, "ranking", seed)
    live = follow(registry)
    live.poll()
    registry.pin("ranking", "default", 1)
    assert live.poll() is True
    assert live.current.version == 1
    live.want(2)
    assert live.poll() is True
    assert live.current.version == 2
    live.want(None)
    live.poll()
    assert live.current.version == 1
    registry.pin("ranking", "default", None)
    live.poll()
    assert live.current.version == 3
    live.want(9)
    assert live.poll() is False
    assert live.current.version == 3
    assert "version 9 was refused" in live.problem


def test_an_unreadable_pin_keeps_what_serves(registry):
    publish_model(registry, "ranking")
    live = follow(registry)
    live.poll()
    pin = registry.load("ranking", "default", 1).path.parent / "pin.json"
    pin.write_text("{broken")
    assert live.poll() is False
    assert live.current.version == 1
    assert "pin.json" in live.problem
    pin.unlink()
    live.poll()
    assert live.problem == ""


def test_background_thread_picks_versions_up(registry):
    live = follow(registry)
    live.start(poll_s=0.01)
    try:
        publish_model(registry, "ranking")
        wait_until(lambda: live.current is not None)
    finally:
        live.stop()
    assert live.current.version == 1


BUILDERS = {
    "ranking": lambda published: build_ranking(published, Reader),
    "cascading": lambda published: build_cascading(published, Reader),
    "retrieval": lambda published: build_retrieval(published, Reader, "exact"),
}


@pytest.mark.parametrize("stage", sorted(BUILDERS))
def test_published_models_are_built(registry, stage):
    publish_model(registry, stage)
    live = follow(registry, stage, BUILDERS[stage])
    assert live.poll() is True, live.problem
    assert live.current.namespace == Namespace(depth=1, dim=8)
    assert live.current.history_length == 16


def test_versions_that_do_not_fit_are_refused_with_the_reason(registry):
    publish_model(registry, "ranking")
    published = registry.load("ranking", "default", 1)
    with pytest.raises(ValueError, match="it is a ranking model"):
        build_cascading(published, Reader)
    with pytest.raises(ValueError, match="has no 'model'"):
        build_ranking(replace(published, config={}), Reader)
    other = {"family": "ranking", "depth": 2, "dim": 8}
    with pytest.raises(ValueError, match="its namespace"):
        build_ranking(replace(published, config={**published.config, "namespace": other}), Reader)
    with pytest.raises(ValueError, match="unknown model settings"):
        build_ranking(
            replace(published, config={**published.config, "model": {"magic": 1}}), Reader
        )
    tensors = dict(published.tensors)
    name = sorted(tensors)[-1]
    tensors[name] = torch.full_like(tensors[name].float(), float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        build_ranking(replace(published, tensors=tensors), Reader)
    del tensors[name]
    with pytest.raises(ValueError, match=r"weights are not those of its config: .* missing"):
        build_ranking(replace(published, tensors=tensors), Reader)


def test_items_that_do_not_fit_are_refused(registry):
    publish_model(registry, "retrieval")
    published = registry.load("retrieval", "default", 1)
    items = published.items
    for changed, message in [
        ({}, "lack the columns"),
        ({k: v for k, v in items.items() if k != "vectors"}, "lack 'vectors'"),
        ({**items, "vectors": items["vectors"][:, :3]}, "item vectors must be"),
        ({**items, "vectors": items["vectors"][:3]}, "item vectors must be"),
        ({**items, "popularity": items["popularity"][:3]}, "popularity must"),
    ]:
        broken = replace(published, extra={"items": changed})
        with pytest.raises(ValueError, match=message):
            build_retrieval(broken, Reader, "exact")


@pytest.mark.parametrize("stage", sorted(BUILDERS))
def test_a_version_that_cannot_answer_is_refused(registry, stage):
    publish_model(registry, stage)
    published = registry.load(stage, "default", 1)
    # Finite weights whose products are not.
    tensors = {
        name: torch.full_like(tensor, 3e38) if tensor.is_floating_point() else tensor
        for name, tensor in published.tensors.items()
    }
    with pytest.raises(ValueError, match="must answer finite scores"):
        BUILDERS[stage](replace(published, tensors=tensors))
