"""Several workers learn what one does, on every kind of table and in half precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from numpy.typing import NDArray
from sample_events import make_events, small_config
from torch import Tensor

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from marm.addressing import NUM_BUCKETS, user_bucket
from marm.admitted_table import AdmittedTable
from marm.config import TableConfig
from marm.events import BINARY_TASKS, EventBatch
from marm.memory import InProcessMemory
from marm.metrics import log_loss
from train.collective import Collective, DistributedWorkers, SingleWorker
from train.config import TrainConfig
from train.metrics import EvaluationWindow
from train.stream import Hooks, StreamTrainer

NUM_EVENTS = 1_600
BATCH_SIZE = 32
NOISE = 0.01
"""Log loss of two runs that differ in the order of users in a batch only."""

MODELS = {
    "hashed": small_config(),
    "errors": small_config(error_layers=2),
    "admitted": small_config(
        num_slots=64, table=TableConfig(kind="admitted", admit_after=2, keep_events=200)
    ),
}


def learnable_events(num_events: int) -> EventBatch:
    """Nine users in ten like items of even numbers alone, in every way; the others odd ones."""
    events = make_events(num_events, num_users=30)
    like = (events.item_id % 2 == 0) != (events.user_id % 10 == 0)
    events.labels[:, : len(BINARY_TASKS)] = like[:, None]
    return events


def one_batch() -> EventBatch:
    """As many events of users of either worker as are a batch of one."""
    events = learnable_events(4 * BATCH_SIZE)
    owner = user_bucket(events.user_id) % 2
    half = [np.flatnonzero(owner == rank)[: BATCH_SIZE // 2] for rank in range(2)]
    return events.take(np.sort(np.concatenate(half)))


def train(
    config: TrainConfig,
    log_path: Path,
    collective: Collective | None = None,
    users_of: tuple[int, int] | None = None,
) -> StreamTrainer:
    """A pass over the users of a worker: by default, of the ``collective``'s."""
    collective = SingleWorker() if collective is None else collective
    rank, world = (collective.rank, collective.world_size) if users_of is None else users_of
    owned = np.arange(NUM_BUCKETS)[rank::world]
    reader = EventLog(log_path).reader(LogOffsets.start(), owned)
    memory = InProcessMemory(config.namespace)  # users never cross workers
    everything = EvaluationWindow(0, 1 << 62)
    trainer = StreamTrainer(config, memory, reader, collective, everything)
    trainer.run(Hooks(lambda: None, lambda: None, lambda: None))
    return trainer


def gradients(trainer: StreamTrainer) -> dict[str, Tensor]:
    """What one step has left of its gradients: Adam's first moments and Adagrad's squares."""
    (learner,) = trainer.learners
    moments = learner._optimizer.state_dict()["state"]
    found = {f"dense {index}": one["exp_avg"] for index, one in moments.items()}
    squares = learner.model.table.squared_gradient
    found["table"] = squares - squares.min()
    for index, table in enumerate(learner.model.error_tables):
        found[f"errors {index}"] = table.squared_gradient - table.squared_gradient.min()
    return found


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
    EventLog(path).append(learnable_events(NUM_EVENTS))
    return path


def _worker(rank: int, world: int, path: str, port: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    collective = DistributedWorkers(torch.device("cpu"))
    for kind in MODELS:
        config = replace(config_of(kind), batch_size=BATCH_SIZE // world)
        step = train(config, Path(path) / "one_batch", collective)
        trainer = train(config, Path(path) / "log", collective)
        model = trainer.learners[0].model
        found = [torch.from_numpy(array) for array in predictions(trainer)]
        kept = dict(model.state_dict()), found, step.step, gradients(step)
        torch.save(kept, f"{path}/{kind}-{rank}.pt")
    torch.distributed.destroy_process_group()


def loss_of_both(workers: Sequence[Sequence[NDArray]]) -> float:
    """Of the later half of what each has predicted."""
    parts = [later_half(list(arrays)) for arrays in workers]
    labels, scores = (np.concatenate(pair) for pair in zip(*parts, strict=True))
    return mean_log_loss(labels, scores)


def test_two_workers_learn_what_one_does(log_path: Path, tmp_path: Path, free_port: int) -> None:
    """One step has the gradients of all events, by right scale, which Adam and Adagrad hide; many
    steps predict as well as one worker does, and better than two that never talk."""
    EventLog(tmp_path / "one_batch").append(one_batch())
    mp.spawn(_worker, args=(2, str(tmp_path), free_port), nprocs=2)
    for kind in MODELS:
        (weights, first, steps, ours), (other, second, _, _) = (
            torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True) for rank in range(2)
        )
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=0, msg=name)
        step = train(config_of(kind), tmp_path / "one_batch")
        assert steps == step.step == 1
        theirs = gradients(step)
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-9, msg=name)

        assert len(first[0]) + len(second[0]) == NUM_EVENTS
        together = loss_of_both([[array.numpy() for array in part] for part in (first, second)])
        one = mean_log_loss(*later_half(predictions(train(config_of(kind), log_path))))
        assert abs(together - one) < NOISE, kind
        half = replace(config_of(kind), batch_size=BATCH_SIZE // 2)
        alone = [train(half, log_path, users_of=(rank, 2)) for rank in range(2)]
        assert loss_of_both([predictions(trainer) for trainer in alone]) > one + NOISE, kind


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
