"""Several workers learn what one does, on every kind of table and in half precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from numpy.typing import NDArray
from sample_events import NOW_MS, make_events, replaced, small_config
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

BATCH_SIZE = 32
NUM_BATCHES = 20
NUM_EVENTS = NUM_BATCHES * BATCH_SIZE
NOISE = 0.02
"""Log loss of a run in half precision."""

SAME = 1e-3
"""Of scores that differ by the order of sums, through all steps: measured 6e-6."""

MODELS = {
    "hashed": small_config(),
    "errors": small_config(error_layers=2),
    "admitted": small_config(
        num_slots=64, table=TableConfig(kind="admitted", admit_after=2, keep_events=200)
    ),
}


def shared_batches(num_batches: int = NUM_BATCHES) -> EventBatch:
    """Events of which every batch of one worker is half of one's users and half of the other's, so
    that two workers have it as a batch each. Nine users in ten like items of even numbers alone, in
    every way; the others odd ones."""
    events = make_events(4 * num_batches * BATCH_SIZE, num_users=30)
    owner, half = owner_of(events), BATCH_SIZE // 2
    first, second = (np.flatnonzero(owner == rank)[: num_batches * half] for rank in range(2))
    batches = np.hstack([first.reshape(num_batches, half), second.reshape(num_batches, half)])
    chosen = events.take(np.sort(batches, axis=1).ravel())
    like = (chosen.item_id % 2 == 0) != (chosen.user_id % 10 == 0)
    chosen.labels[:, : len(BINARY_TASKS)] = like[:, None]
    return replaced(chosen, timestamp_ms=NOW_MS + 1000 * np.arange(len(chosen)))


def owner_of(events: EventBatch) -> NDArray[np.int64]:
    """The worker of two that has each event's user."""
    return user_bucket(events.user_id) % 2


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
    for index, table in enumerate([learner.model.table, *learner.model.error_tables]):
        squares = table.squared_gradient
        found[f"table {index}"] = squares - squares.min()
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
    EventLog(path).append(shared_batches())
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
        weights = dict(trainer.learners[0].model.state_dict())
        scores = torch.from_numpy(predictions(trainer)[1])
        torch.save((weights, scores, trainer.step, gradients(step)), f"{path}/{kind}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_workers_learn_what_one_does(log_path: Path, tmp_path: Path, free_port: int) -> None:
    """Batches that hold the same events give the same predictions, step after step; one step has
    the gradients of all events, by the right scale, which Adam and Adagrad hide."""
    EventLog(tmp_path / "one_batch").append(shared_batches(1))
    mp.spawn(_worker, args=(2, str(tmp_path), free_port), nprocs=2)
    owner = owner_of(shared_batches())
    for kind in MODELS:
        (weights, first, steps, ours), (other, second, _, _) = (
            torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True) for rank in range(2)
        )
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=0, msg=name)
        theirs = gradients(train(config_of(kind), tmp_path / "one_batch"))
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=6e-8, msg=name)

        one = train(config_of(kind), log_path)
        assert steps == one.step == NUM_BATCHES
        together = np.empty_like(predictions(one)[1])
        together[owner == 0], together[owner == 1] = first.numpy(), second.numpy()
        np.testing.assert_allclose(together, predictions(one)[1], atol=SAME, err_msg=kind)
        half = replace(config_of(kind), batch_size=BATCH_SIZE // 2)
        apart = predictions(train(half, log_path, users_of=(0, 2)))[1]
        assert np.abs(apart - first.numpy()).max() > 20 * SAME, kind


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
