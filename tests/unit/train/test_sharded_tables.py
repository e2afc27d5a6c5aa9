"""Tables whose rows are spread over workers learn what replicated ones do, row by row.

Needs the extra `sharded`; `test_table_placement` has what can be tested without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sample_events import make_events, small_config

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.home import Home
from cache_actors.registry import ModelRegistry
from marm.addressing import NUM_BUCKETS
from marm.config import TableConfig
from marm.memory import InProcessMemory
from train.checkpoint import checkpoint_offsets, load_checkpoint, save_checkpoint
from train.collective import Collective, DistributedWorkers, SingleWorker
from train.config import TrainConfig, three_stages
from train.learner_file import load_learner_state
from train.metrics import EvaluationWindow
from train.publish import publish_versions
from train.stream import Hooks, StreamTrainer

pytest.importorskip("torchrec", reason="needs the extra 'sharded'")
pytest.importorskip("fbgemm_gpu", reason="needs the extra 'sharded'")

NUM_EVENTS = 192
CHECKPOINT_STEP = 3
BATCH_SIZE = 32
TABLES = {
    "hashed": TableConfig(),
    "admitted": TableConfig(kind="admitted", admit_after=2, keep_events=60),
}
NUM_ROWS = {"hashed": 101, "admitted": 96 + 8}
"""Of 101 slots; a bucket of the admitted table has 8, and ids of a feature share one of 8 rows."""

ALL_ROWS = slice(0, 1 << 40)
NOISE = {"rtol": 1e-4, "atol": 1e-5}
"""Sums in another order, through `NUM_EVENTS` / `BATCH_SIZE` steps."""


def config_of(kind: str, tables: str, num_workers: int = 1) -> TrainConfig:
    # 101 slots: two workers do not have as many rows each.
    ranking = small_config(
        feature_dim=8, num_slots=101, output_dim=8, table=TABLES[kind], error_layers=2
    )
    models = three_stages(ranking, cascading_history=5, retrieval_history=10)
    # While ids share a row all items are alike: retrieval's gradients are then rounding errors,
    # which Adam makes large.
    return TrainConfig(
        models=models if kind == "hashed" else models[:2],
        batch_size=BATCH_SIZE // num_workers,
        num_workers=num_workers,
        tables=tables,
        checkpoint_every_steps=CHECKPOINT_STEP,
    )


def start(
    config: TrainConfig, log: EventLog, collective: Collective, offsets: LogOffsets
) -> StreamTrainer:
    owned = np.arange(NUM_BUCKETS)[collective.rank :: collective.world_size]
    memory = InProcessMemory(config.namespace)  # users never cross workers
    reader, everything = log.reader(offsets, owned), EvaluationWindow(0, 1 << 62)
    return StreamTrainer(config, memory, reader, collective, everything)


def train(config: TrainConfig, log_path: Path, collective: Collective, out: Path) -> StreamTrainer:
    """Train through the log; a checkpoint on the way and one at the end, and versions."""
    trainer = start(config, EventLog(log_path), collective, LogOffsets.start())

    def checkpoint() -> None:
        if trainer.step == CHECKPOINT_STEP:
            save(trainer, out / "middle")

    trainer.run(replace(Hooks.nothing(), checkpoint=checkpoint))
    save(trainer, out / "end")
    publish_versions(trainer, Home(out / "home"), trainer.offsets, 0)
    return trainer


def save(trainer: StreamTrainer, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    parts = trainer.collective.gather(trainer.offsets.to_dict())
    owned = [list(range(rank, NUM_BUCKETS, len(parts))) for rank in range(len(parts))]
    offsets = LogOffsets.merge([LogOffsets.from_dict(part) for part in parts], owned)
    save_checkpoint(trainer, directory, offsets)


def _worker(rank: int, world: int, log_path: str, out_path: str, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    collective = DistributedWorkers(torch.device("cpu"))
    for kind in TABLES:
        for tables in ("replicated", "sharded"):
            out = Path(out_path) / f"{kind}-{tables}"
            train(config_of(kind, tables, world), Path(log_path), collective, out)
        _check_shares(kind, Path(log_path), collective)
    dist.destroy_process_group()


def _check_shares(kind: str, log_path: Path, collective: Collective) -> None:
    """Each row is on one worker, and nobody reads a share as if it were the table."""
    config = config_of(kind, "sharded", collective.world_size)
    model = start(config, EventLog(log_path), collective, LogOffsets.start()).learners[0].model
    sizes = collective.gather(len(model.table.weight))
    assert sum(sizes) == NUM_ROWS[kind]
    assert max(sizes) - min(sizes) <= 1
    with pytest.raises(RuntimeError, match="on several workers; read them with rows_of"):
        model.table.find(np.zeros(1, np.int64))


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    EventLog(path).append(make_events(NUM_EVENTS, num_users=30))
    return path


@pytest.fixture
def no_process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():  # a sharded run of one process makes one
        dist.destroy_process_group()


def assert_same_checkpoints(one: Path, other: Path) -> None:
    files = sorted(path.name for path in other.glob("*.safetensors"))
    assert "ranking.safetensors" in files
    for file in files:
        ours, theirs = (load_learner_state(path / file, ALL_ROWS) for path in (one, other))
        assert ours["model"].keys() == theirs["model"].keys()
        for name, tensor in theirs["model"].items():
            assert ours["model"][name].dtype == tensor.dtype, name
            torch.testing.assert_close(
                ours["model"][name], tensor, msg=lambda found, at=name: f"{at}: {found}", **NOISE
            )
        torch.testing.assert_close(ours["table"], theirs["table"], rtol=1e-3, atol=1e-8)


def assert_same_versions(one: Path, other: Path) -> None:
    """Published weights answer alike; serving checks that they give the probe's answer."""
    ours, theirs = (ModelRegistry(Home(path).models) for path in (one, other))
    for stage in sorted(path.name for path in Home(other).models.iterdir()):
        (version,) = ours.versions(stage, "default")
        probes = [
            registry.load(stage, "default", version).config["probe"] for registry in (ours, theirs)
        ]
        assert len(probes[0]) > 0
        np.testing.assert_allclose(*probes, **NOISE)


@pytest.mark.usefixtures("no_process_group")
@pytest.mark.parametrize("kind", sorted(TABLES))
def test_one_worker_learns_what_a_replicated_table_does(
    kind: str, log_path: Path, tmp_path: Path
) -> None:
    for tables in ("replicated", "sharded"):
        trainer = train(config_of(kind, tables), log_path, SingleWorker(), tmp_path / tables)
        assert trainer.events_seen == NUM_EVENTS
    for part in ("middle", "end"):
        assert_same_checkpoints(tmp_path / "sharded" / part, tmp_path / "replicated" / part)
    assert_same_versions(tmp_path / "sharded" / "home", tmp_path / "replicated" / "home")


@pytest.mark.usefixtures("no_process_group")
def test_two_workers_and_resuming_with_another_number(
    log_path: Path, tmp_path: Path, free_port: int
) -> None:
    """Two processes with sharded tables equal two with replicated ones; one process continues what
    two began, with tables of either placement."""
    mp.spawn(_worker, args=(2, str(log_path), str(tmp_path), free_port), nprocs=2)
    for kind in TABLES:
        of = {tables: tmp_path / f"{kind}-{tables}" for tables in ("replicated", "sharded")}
        for part in ("middle", "end"):
            assert_same_checkpoints(of["sharded"] / part, of["replicated"] / part)
        assert_same_versions(of["sharded"] / "home", of["replicated"] / "home")
        for tables in of:
            again = tmp_path / f"{kind}-again-{tables}"
            resumed = resume(config_of(kind, tables), log_path, of["sharded"] / "middle", again)
            assert resumed.events_seen == NUM_EVENTS
        first, second = (tmp_path / f"{kind}-again-{tables}" for tables in of)
        assert_same_checkpoints(first, second)


def resume(config: TrainConfig, log_path: Path, checkpoint: Path, out: Path) -> StreamTrainer:
    offsets = checkpoint_offsets(checkpoint, config)
    trainer = start(config, EventLog(log_path), SingleWorker(), offsets)
    load_checkpoint(trainer, checkpoint)
    trainer.run(Hooks.nothing())
    save(trainer, out)
    return trainer
