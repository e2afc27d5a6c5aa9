"""Several workers learn what one does, on every kind of table and in half precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from sample_events import make_events, small_config

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from marm.addressing import NUM_BUCKETS
from marm.admitted_table import AdmittedTable
from marm.config import TableConfig
from marm.events import BINARY_TASKS
from marm.memory import InProcessMemory
from marm.metrics import log_loss
from train.collective import Collective, DistributedWorkers, SingleWorker
from train.config import TrainConfig
from train.metrics import EvaluationWindow
from train.stream import Hooks, StreamTrainer

NUM_EVENTS = 800
BATCH_SIZE = 32
NOISE = 0.02
"""Log loss of two runs that differ in the order of users in a batch only."""

MODELS = {
    "hashed": small_config(),
    "admitted": small_config(
        num_slots=64, table=TableConfig(kind="admitted", admit_after=2, keep_events=200)
    ),
}


def train(
    config: TrainConfig, log_path: Path, collective: Collective | None = None
) -> StreamTrainer:
    collective = SingleWorker() if collective is None else collective
    owned = np.arange(NUM_BUCKETS)[collective.rank :: collective.world_size]
    reader = EventLog(log_path).reader(LogOffsets.start(), owned)
    memory = InProcessMemory(config.namespace)  # users never cross workers
    everything = EvaluationWindow(0, 1 << 62)
    trainer = StreamTrainer(config, memory, reader, collective, everything)
    trainer.run(Hooks(lambda: None, lambda: None, lambda: None))
    return trainer


def config_of(kind: str) -> TrainConfig:
    return TrainConfig(models=(MODELS[kind],), batch_size=BATCH_SIZE)


def predictions(trainer: StreamTrainer) -> list[np.ndarray]:
    arrays = trainer.metrics.evaluation["ranking"].arrays()
    return [arrays["labels"], arrays["scores"]]


def mean_log_loss(labels: np.ndarray, scores: np.ndarray) -> float:
    """Over the binary tasks."""
    losses = []
    for task in range(len(BINARY_TASKS)):
        observed = ~np.isnan(labels[:, task])
        losses.append(log_loss(labels[observed, task], scores[observed, task]))
    return float(np.mean(losses))


def later_half(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """What was predicted after learning from as much."""
    return [array[len(array) // 2 :] for array in arrays]


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    EventLog(path).append(make_events(NUM_EVENTS, num_users=30))
    return path


def _worker(rank: int, world: int, log_path: str, out_path: str, port: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    collective = DistributedWorkers(torch.device("cpu"))
    for kind in MODELS:
        config = replace(config_of(kind), batch_size=BATCH_SIZE // world)
        trainer = train(config, Path(log_path), collective)
        model = trainer.learners[0].model
        found = [torch.from_numpy(array) for array in predictions(trainer)]
        torch.save((dict(model.state_dict()), found), f"{out_path}/{kind}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_workers_learn_what_one_does(log_path: Path, tmp_path: Path, free_port: int) -> None:
    mp.spawn(_worker, args=(2, str(log_path), str(tmp_path), free_port), nprocs=2)
    for kind in MODELS:
        (weights, first), (other, second) = (
            torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True) for rank in range(2)
        )
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=0, msg=name)
        alone = train(config_of(kind), log_path)
        parts = [later_half([array.numpy() for array in part]) for part in (first, second)]
        labels, scores = (np.concatenate(pair) for pair in zip(*parts, strict=True))
        assert len(first[0]) + len(second[0]) == NUM_EVENTS
        one = mean_log_loss(*later_half(predictions(alone)))
        assert abs(mean_log_loss(labels, scores) - one) < NOISE, kind


def test_an_admitted_table_counts_all_events(log_path: Path) -> None:
    table = train(config_of("admitted"), log_path).learners[0].model.table
    assert isinstance(table, AdmittedTable)
    assert int(table.num_seen) == NUM_EVENTS
    assert table.num_admitted > 0


def test_half_precision_on_the_cpu_learns_what_single_precision_does(log_path: Path) -> None:
    config = config_of("hashed")
    single = train(config, log_path)
    half = train(replace(config, precision="bf16"), log_path)
    assert half.events_seen == NUM_EVENTS
    for name, tensor in half.learners[0].model.state_dict().items():
        assert tensor.dtype == single.learners[0].model.state_dict()[name].dtype, name
        assert torch.isfinite(tensor).all(), name
    ours, theirs = predictions(half), predictions(single)
    assert not np.array_equal(ours[1], theirs[1])  # it is half precision
    assert abs(mean_log_loss(*later_half(ours)) - mean_log_loss(*later_half(theirs))) < NOISE
