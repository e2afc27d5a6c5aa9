"""Asking for sharded tables: what is refused, and how the need of memory falls."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from sample_events import small_config

from marm.config import TableConfig
from train.collective import SingleWorker
from train.config import TrainConfig
from train.learner import Learner
from train.learner_file import load_learner_state, save_learner_state
from train.table_memory import needed_bytes
from train.table_placement import MissingExtraError, require_placement

MODELS = (small_config(feature_dim=8),)


def test_a_placement_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="tables must be 'replicated' or 'sharded', got 'split'"):
        TrainConfig(models=MODELS, tables="split")


def test_rows_of_a_width_that_fbgemm_does_not_know_are_refused() -> None:
    models = (small_config(feature_dim=6),)
    TrainConfig(models=models)
    with pytest.raises(ValueError, match=r"multiple of 4, got 6; change it, or use tables 'repl"):
        TrainConfig(models=models, tables="sharded")


def test_configuration_keeps_the_placement() -> None:
    config = TrainConfig(models=MODELS, tables="sharded", num_workers=3)
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert (config.num_shards, TrainConfig(models=MODELS, num_workers=3).num_shards) == (3, 1)


@pytest.mark.skipif(
    importlib.util.find_spec("torchrec") is not None, reason="the extra 'sharded' is installed"
)
def test_without_the_extra_the_error_says_what_to_install() -> None:
    config = TrainConfig(models=MODELS, tables="sharded")
    with pytest.raises(MissingExtraError, match=r"make sharded.*--no-deps torchrec==1\.8\.0"):
        require_placement(config)
    with pytest.raises(MissingExtraError, match=r"No module named.*make sharded"):
        Learner(MODELS[0], config, SingleWorker())
    require_placement(TrainConfig(models=MODELS))


@pytest.mark.parametrize("kind", ["hashed", "admitted"])
def test_a_worker_that_gathers_nothing_needs_its_share(kind: str) -> None:
    models = [small_config(num_slots=1 << 20, feature_dim=64, table=TableConfig(kind=kind))]
    whole, shared = needed_bytes(models), needed_bytes(models, num_shards=4, num_gathering=0)
    first = needed_bytes(models, num_shards=4)
    own_rows = 4 * 64 * (1 << 20)
    assert shared < whole - own_rows  # no copy, and a quarter of the rows
    assert shared < first
    assert needed_bytes(models, 4, 4) == 3 * shared + first


def test_a_checkpoint_is_read_in_parts(tmp_path: Path) -> None:
    learner = Learner(MODELS[0], TrainConfig(models=MODELS), SingleWorker())
    state = learner.state()
    assert state is not None
    state["table"].copy_(torch.arange(len(state["table"])))
    save_learner_state(state, tmp_path / "x.safetensors")
    held = slice(100, 107)
    part = load_learner_state(tmp_path / "x.safetensors", held)
    assert torch.equal(part["table"], state["table"][held])
    assert torch.equal(part["model"]["table.weight"], state["model"]["table.weight"][held])
    assert learner.held_rows == slice(0, 512)
    other = "net.prior_scale"
    assert torch.equal(part["model"][other], state["model"][other])
