"""Every kind of bad version is refused by name while the version before it goes on serving."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from serving_models import InProcessReader, make_rows, publish_model, small_config

from cache_actors.registry import ModelRegistry
from marm.memory import Namespace
from marm.model_factory import build_model
from marm.probe import probe, probe_items, probe_rows
from stages.assemble import build_ranking
from stages.live_model import LiveModel
from stages.loader_thread import LOADER_NICE, lower_priority
from stages.swap_check import KeepsRows
from stages.version_checks import check_memory, worst_difference

LOGGER = logging.getLogger("test-refusals")


@pytest.fixture
def registry(tmp_path):
    return ModelRegistry(tmp_path / "models")


def build(published):
    return build_ranking(published, InProcessReader)


def republish(registry, change_config=lambda config: None, change_tensors=lambda tensors: None):
    """Publish version 1 again with changes; whole and with right checksums."""
    published = registry.load("ranking", "default", 1)
    config = {key: published.config[key] for key in ("step", "model", "namespace")}
    config = json.loads(json.dumps(config))
    tensors = dict(published.tensors)
    change_config(config)
    change_tensors(tensors)
    return registry.publish("ranking", "default", tensors, config)


def half_written(registry):
    path = registry.load("ranking", "default", 1).path
    copy = path.parent / "00000002"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes())


def torn(registry):
    republish(registry)
    path = registry.load("ranking", "default", 2).path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def checksum_differs(registry):
    republish(registry)
    path = registry.load("ranking", "default", 2).path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def wrong_stage(registry):
    republish(registry, lambda config: config["model"].update(stage="cascading"))


def feature_unknown_here(registry):
    republish(registry, lambda config: config["model"]["features"].append("music"))


def other_feature_set(registry):
    # Weights of two recency features under a config that has one.
    republish(registry, lambda config: config["model"].update(feedback_signals=["click"]))


def missing_tensor(registry):
    republish(registry, change_tensors=lambda tensors: tensors.pop("table.weight"))


def unknown_tensor(registry):
    republish(registry, change_tensors=lambda tensors: tensors.update(extra=torch.ones(1)))


def other_type(registry):
    def as_integers(tensors):
        tensors["table.weight"] = tensors["table.weight"].long()

    republish(registry, change_tensors=as_integers)


def nan_weights(registry):
    def spoil(tensors):
        tensors["table.weight"][3] = float("nan")

    republish(registry, change_tensors=spoil)


def namespace_is_not_the_models(registry):
    republish(registry, lambda config: config["namespace"].update(dim=16))


def recorded_answer_differs(registry):
    answer = probe(build_model(small_config("ranking"))).tolist()
    republish(registry, lambda config: config.update(probe=[answer[0] + 0.5, *answer[1:]]))


def recorded_answer_is_no_list(registry):
    republish(registry, lambda config: config.update(probe="0.5"))


REFUSALS = [
    (half_written, "00000002 is half-written"),
    (torn, "is torn"),
    (checksum_differs, "its checksum differs"),
    (wrong_stage, "it is a cascading model, but is published as ranking"),
    (feature_unknown_here, "features must be distinct names of"),
    (other_feature_set, "must have the shape"),
    (missing_tensor, "['table.weight'] missing, none unknown"),
    (unknown_tensor, "none missing, ['extra'] unknown"),
    (other_type, "must be of type torch.float32, got torch.int64"),
    (nan_weights, "tensor 'table.weight' holds NaN or infinity"),
    (namespace_is_not_the_models, "its namespace ranking-l1-d16"),
    (recorded_answer_differs, "serve it with the code that trained it"),
    (recorded_answer_is_no_list, "must be a list of numbers"),
]


@dataclass
class Watcher:
    """Remembers what a `LiveObserver` is told."""

    swaps: list
    refusals: list

    def swapped(self, published, load_ms, by_hand):
        assert load_ms > 0
        self.swaps.append((published.version, by_hand))

    def refused(self, version):
        self.refusals.append(version)


@pytest.mark.parametrize(
    ("publish_bad", "reason"), REFUSALS, ids=lambda x: getattr(x, "__name__", "")
)
def test_a_bad_version_is_refused_and_the_one_before_serves_on(
    registry, caplog, publish_bad, reason
):
    publish_model(registry, "ranking")
    watcher = Watcher([], [])
    live = LiveModel(registry, "ranking", "default", build, LOGGER, observer=watcher)
    assert live.poll() is True, live.problem
    before = live.current
    publish_bad(registry)
    with caplog.at_level(logging.ERROR, LOGGER.name):
        assert live.poll() is False
    assert live.current is before
    assert reason in live.problem
    (record,) = caplog.records
    assert record.getMessage() == f"{live.problem}; version 1 goes on serving"
    assert "\n" not in record.getMessage()
    assert (watcher.swaps, watcher.refusals) == ([(1, False)], [2])


def test_a_version_answers_the_probe_as_recorded(registry):
    torch.manual_seed(0)
    answer = probe(build_model(small_config("ranking")))
    publish_model(registry, "ranking", seed=0)
    republish(registry, lambda config: config.update(probe=answer.tolist()))
    live = LiveModel(registry, "ranking", "default", build, LOGGER)
    live.poll()
    assert (live.current.version, live.problem) == (2, "")


def test_the_old_version_is_freed_with_its_last_request(registry):
    publish_model(registry, "ranking")
    live = LiveModel(registry, "ranking", "default", build, LOGGER)
    live.poll()
    held_by_a_request = live.current
    weights = weakref.ref(held_by_a_request.model.table.weight)
    publish_model(registry, "ranking", seed=1)
    assert live.poll() is True
    assert weights() is not None
    del held_by_a_request
    assert weights() is None


def test_a_version_that_would_lose_all_rows_waits_for_a_pin(registry):
    wide = Namespace(depth=1, dim=16)
    held = {Namespace(depth=1, dim=8): 5000, wide: 0}
    publish_model(registry, "ranking")
    live = LiveModel(registry, "ranking", "default", build, LOGGER, KeepsRows(held.get))
    live.poll()
    publish_model(registry, "ranking", namespace=wide)
    assert live.poll() is False
    assert "the memory holds no rows, and version 1 reads 5000 rows" in live.problem
    registry.pin("ranking", "default", 2)
    assert live.poll() is True
    assert (live.current.version, live.problem) == (2, "")


@pytest.mark.parametrize("rows", [None, 1])
def test_rows_or_silence_let_a_version_of_another_namespace_in(registry, rows):
    wide = Namespace(depth=1, dim=16)
    held = {Namespace(depth=1, dim=8): 5000, wide: rows}
    publish_model(registry, "ranking")
    live = LiveModel(registry, "ranking", "default", build, LOGGER, KeepsRows(held.get))
    live.poll()
    publish_model(registry, "ranking", namespace=wide)
    assert live.poll() is True


def test_a_memory_with_rows_of_another_shape_is_found_by_the_first_read():
    narrow = InProcessReader(Namespace(depth=1, dim=8))
    narrow.save_for(7, make_rows([1, 2]))
    check_memory(narrow, narrow.namespace)
    with pytest.raises(ValueError, match=r"it reads rows of ranking-l1-d16"):
        check_memory(narrow, Namespace(depth=1, dim=16))
    narrow.down = True
    check_memory(narrow, narrow.namespace)


def test_a_pin_of_a_refused_version_is_tried_at_once(registry):
    publish_model(registry, "ranking")
    publish_model(registry, "ranking", seed=1)
    path = registry.load("ranking", "default", 2).path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    live = LiveModel(registry, "ranking", "default", build, LOGGER)
    live.poll()
    assert live.current.version == 1
    path.write_bytes(content)
    assert live.poll() is False
    registry.pin("ranking", "default", 2)
    assert live.poll() is True
    assert live.current.version == 2


@pytest.mark.skipif(sys.platform != "linux", reason="niceness is per thread on Linux only")
def test_the_loading_thread_yields_and_no_other_does():
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def load() -> None:
        lower_priority()
        seen.append(niceness())

    seen: list[int] = []
    before = niceness()
    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    assert seen == [LOADER_NICE]
    assert niceness() == before


def test_the_probe_shows_every_part_of_a_row():
    rows = probe_rows(Namespace(depth=2, dim=4), 20)
    assert rows.counts.tolist() == [20]
    assert set(rows.rows["written_step"]) == {-1, 1}
    assert np.abs(rows.rows["memory"][1::2]).max() > 0
    assert np.all(np.diff(rows.rows["timestamp_ms"]) > 0)
    assert len(probe_items(3)) == 3


def test_differences_are_relative_above_one():
    found, expected = np.array([0.5, 100.1], np.float32), np.array([0.4, 100.0], np.float32)
    assert worst_difference(found, expected) == pytest.approx(0.1, rel=1e-5)
    assert worst_difference(found[1:], expected[1:]) == pytest.approx(0.001, rel=1e-2)
    assert worst_difference(np.array([np.nan], np.float32), expected[:1]) == np.inf
    assert worst_difference(found[:0], expected[:0]) == 0.0
