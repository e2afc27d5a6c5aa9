"""The training stream without Ray: exactness of overlap, resuming, reading and several workers."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from numpy.typing import NDArray

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.store.row_formats import as_read
from marm.addressing import NUM_BUCKETS
from marm.config import ModelConfig
from marm.events import TASKS, EventBatch
from marm.memory import ROW_DTYPES, DoneAck, InProcessMemory, Namespace, UserRows
from marm.sequence import enters_sequence
from train.checkpoint import CheckpointError, checkpoint_offsets, load_checkpoint, save_checkpoint
from train.collective import DistributedWorkers, SingleWorker
from train.config import TrainConfig, three_stages
from train.evaluation import evaluate
from train.metrics import EvaluationWindow
from train.stream import Hooks, StreamTrainer

NAMESPACE = Namespace(depth=2, dim=8, dtype="float32")
RANKING = ModelConfig(
    namespace=NAMESPACE,
    depth=2,
    attention_dim=8,
    feature_dim=8,
    history_length=10,
    num_slots=512,
    num_experts=2,
    expert_dim=8,
    output_dim=8,
)
EVERYTHING = EvaluationWindow(0, 1 << 62)
CONFIG = TrainConfig(models=three_stages(RANKING), batch_size=32, checkpoint_every_steps=4)


def make_events(num_events: int = 600, seed: int = 0) -> EventBatch:
    rng = np.random.default_rng(seed)
    labels = (rng.random((num_events, len(TASKS))) < 0.4).astype(np.float32)
    labels[:, -1] = rng.exponential(20.0, num_events)
    zeros = np.zeros(num_events, np.int64)
    return EventBatch(
        user_id=rng.integers(0, 12, num_events),
        item_id=rng.integers(0, 40, num_events),
        timestamp_ms=np.arange(num_events) * 1000 + 1_600_000_000_000,
        event_key=rng.integers(0, 2**63, num_events).astype(np.uint64),
        author_id=rng.integers(1, 6, num_events),
        tag_id=rng.integers(1, 4, num_events),
        duration_ms=zeros + 15_000,
        context_id=zeros.astype(np.int32),
        labels=labels,
    )


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    log = EventLog(tmp_path / "log")
    log.append(make_events())
    return log


class LazyAck:
    def __init__(self, memory: LazyMemory) -> None:
        self._memory, self._is_done = memory, False

    def done(self) -> bool:
        return self._is_done

    def wait(self, timeout_s: float | None = None) -> None:
        if not self._is_done:
            self._memory.apply_oldest()
            self._is_done = True


class LazyMemory(InProcessMemory):
    """A memory as late as allowed: a save is applied only when somebody waits for it."""

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(namespace)
        self._queue: list[tuple[NDArray, NDArray]] = []

    def save(self, user_ids: NDArray, rows: NDArray) -> LazyAck:  # type: ignore[override]
        self._queue.append((user_ids, rows))
        return LazyAck(self)

    def apply_oldest(self) -> None:
        InProcessMemory.save(self, *self._queue.pop(0))


class RacingMemory(LazyMemory):
    """A fetch that answers from before a save which is acknowledged while the fetch is under way.

    That is what a slow fetch beside a checkpoint or a publication does.
    """

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(namespace)
        self.flushed = threading.Event()
        self._num_fetches = 0

    def fetch(self, user_ids: NDArray, n: int, before_ms: NDArray | None = None) -> UserRows:
        found = super().fetch(user_ids, n, before_ms)
        self._num_fetches += 1
        if self._num_fetches > 1:  # nothing was saved before the first
            assert self.flushed.wait(30)
            self.flushed.clear()
        return found


def no_hooks() -> Hooks:
    return Hooks(lambda: None, lambda: None, lambda: None)


def train(
    config: TrainConfig, memory: InProcessMemory, log: EventLog, hooks: Hooks | None = None
) -> StreamTrainer:
    trainer = StreamTrainer(
        config, memory, log.reader(LogOffsets.start()), SingleWorker(), EVERYTHING
    )
    trainer.run(hooks or no_hooks())
    return trainer


def weights(trainer: StreamTrainer) -> dict[str, torch.Tensor]:
    return {
        f"{learner.stage}.{name}": tensor.clone()
        for learner in trainer.learners
        for name, tensor in learner.model.state_dict().items()
    }


def assert_same(a: StreamTrainer, b: StreamTrainer) -> None:
    expected = weights(b)
    for name, tensor in weights(a).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)
    for stage, predictions in a.metrics.evaluation.items():
        other = b.metrics.evaluation[stage].arrays()
        for name, array in predictions.arrays().items():
            np.testing.assert_array_equal(array, other[name])


def all_rows(memory: InProcessMemory) -> UserRows:
    """Everything stored, but for the time of day at which it was computed."""
    found = InProcessMemory.fetch(memory, np.arange(12), 1000)
    found.rows["written_s"] = 0
    return found


def test_learns_every_event_of_every_stage(log: EventLog) -> None:
    memory = InProcessMemory(NAMESPACE)
    trainer = train(CONFIG, memory, log)
    assert trainer.events_seen == 600
    assert {stage: len(part) for stage, part in trainer.metrics.evaluation.items()} == {
        "ranking": 600,
        "cascading": 600,
        "retrieval": 600,
    }
    rows = all_rows(memory).rows
    assert len(rows) == 600
    assert (rows["written_step"] >= 0).all()
    summary = trainer.metrics.evaluation["ranking"].summarize()
    assert set(summary) == set(TASKS)


class AtRest(InProcessMemory):
    """Keeps rows as a store does."""

    def save(self, user_ids: NDArray, rows: NDArray) -> DoneAck:
        return super().save(user_ids, as_read(self.namespace, rows))


@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_late_acknowledgements_change_nothing(log: EventLog, dtype: str) -> None:
    namespace = replace(NAMESPACE, dtype=dtype)
    config = replace(CONFIG, models=three_stages(replace(RANKING, namespace=namespace)))
    prompt_memory, late_memory = AtRest(namespace), LazyMemory(namespace)
    prompt, late = train(config, prompt_memory, log), train(config, late_memory, log)
    assert_same(prompt, late)
    assert all_rows(prompt_memory).rows.tobytes() == all_rows(late_memory).rows.tobytes()


def test_publishing_during_a_fetch_changes_nothing(log: EventLog) -> None:
    memory = InProcessMemory(NAMESPACE)
    config = replace(CONFIG, publish_every_steps=1)
    expected = train(config, memory, log)
    racing_memory = RacingMemory(NAMESPACE)
    hooks = Hooks(lambda: None, racing_memory.flushed.set, lambda: None)
    racing = train(config, racing_memory, log, hooks)
    assert_same(racing, expected)
    assert all_rows(memory).rows.tobytes() == all_rows(racing_memory).rows.tobytes()


def test_resuming_after_a_crash_equals_an_unbroken_run(log: EventLog, tmp_path: Path) -> None:
    unbroken_memory, memory = InProcessMemory(NAMESPACE), InProcessMemory(NAMESPACE)
    unbroken = train(CONFIG, unbroken_memory, log)

    class CrashError(Exception):
        pass

    checkpoints: list[Path] = []
    first = StreamTrainer(
        CONFIG, memory, log.reader(LogOffsets.start()), SingleWorker(), EVERYTHING
    )

    def checkpoint() -> None:
        directory = tmp_path / f"checkpoint-{first.step}"
        directory.mkdir()
        save_checkpoint(first, directory, first.offsets)
        checkpoints.append(directory)

    def crash_later() -> None:
        if first.step == 11:  # three steps after the last checkpoint, whose rows are stored
            raise CrashError

    with pytest.raises(CrashError):
        first.run(Hooks(checkpoint, lambda: None, crash_later))
    assert [path.name for path in checkpoints] == ["checkpoint-4", "checkpoint-8"]

    offsets = checkpoint_offsets(checkpoints[-1], CONFIG)
    second = StreamTrainer(CONFIG, memory, log.reader(offsets), SingleWorker(), EVERYTHING)
    load_checkpoint(second, checkpoints[-1])
    second.run(no_hooks())
    assert second.step == unbroken.step
    assert second.events_seen == unbroken.events_seen
    assert_same(second, unbroken)
    assert all_rows(memory).rows.tobytes() == all_rows(unbroken_memory).rows.tobytes()


def test_a_checkpoint_of_other_models_is_refused(log: EventLog, tmp_path: Path) -> None:
    trainer = train(CONFIG, InProcessMemory(NAMESPACE), log)
    save_checkpoint(trainer, tmp_path, trainer.offsets)
    other = replace(CONFIG, models=(replace(RANKING, history_length=11),))
    with pytest.raises(CheckpointError, match="other settings"):
        checkpoint_offsets(tmp_path, other)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        checkpoint_offsets(tmp_path, CONFIG)


def test_readers_alone_read_the_same_as_beside_the_writer(log: EventLog) -> None:
    """Time travel: from a full memory, a reader sees what it would have seen at the time."""
    memory = InProcessMemory(NAMESPACE)
    joint = train(CONFIG, memory, log)
    before = all_rows(memory).rows.tobytes()
    readers = replace(CONFIG, models=CONFIG.models[1:])
    alone = train(readers, memory, log)
    assert all_rows(memory).rows.tobytes() == before  # never written
    for stage in ("cascading", "retrieval"):
        np.testing.assert_allclose(
            alone.metrics.evaluation[stage].arrays()["scores"],
            joint.metrics.evaluation[stage].arrays()["scores"],
            rtol=1e-3,
            atol=1e-4,
        )


def test_only_chosen_events_enter_the_sequence(log: EventLog) -> None:
    namespace = replace(NAMESPACE, sequence="long_view")
    config = replace(CONFIG, models=(replace(RANKING, namespace=namespace),))
    memory = InProcessMemory(namespace)
    train(config, memory, log)
    assert len(all_rows(memory).rows) == int(enters_sequence(make_events(), "long_view").sum())


def test_following_learns_what_the_log_gains_and_publishes_it(log: EventLog) -> None:
    config = replace(CONFIG, follow=True, idle_timeout_s=0.5)
    later = replace(make_events(64, seed=1), timestamp_ms=make_events(64).timestamp_ms + 10**9)
    published: list[int] = []
    grown: list[int] = []
    trainer = StreamTrainer(
        config,
        InProcessMemory(NAMESPACE),
        log.reader(LogOffsets.start()),
        SingleWorker(),
        EVERYTHING,
    )

    def grow_at_the_end() -> None:
        if trainer.events_seen == 600:
            grown.append(log.append(later))

    hooks = Hooks(lambda: None, lambda: published.append(trainer.events_seen), grow_at_the_end)
    trainer.run(hooks)
    assert len(grown) == 1
    assert trainer.events_seen == 664
    assert published[-1] == 664
    assert trainer.offsets == log.end()


def test_late_events_see_what_they_would_one_by_one(tmp_path: Path) -> None:
    """However they are batched: the rows of late and repeated events, and of those after them."""
    log = EventLog(tmp_path)
    events = make_events(60)
    order = np.random.default_rng(3).permutation(60)
    log.append(events.take(np.arange(60) % 2 == 0))
    log.append(events.take(np.sort(order[:30])))  # older and repeated events, in time order
    frozen = replace(CONFIG, dense_learning_rate=1e-12, sparse_learning_rate=1e-12)
    memories = []
    for batch_size in (1, 32):
        memory = InProcessMemory(NAMESPACE)
        models = (CONFIG.models[0],)
        train(replace(frozen, models=models, batch_size=batch_size), memory, log)
        memories.append(all_rows(memory))
    one_by_one, batched = memories
    assert one_by_one.offsets.tolist() == batched.offsets.tolist()
    np.testing.assert_array_equal(one_by_one.rows["event_key"], batched.rows["event_key"])
    np.testing.assert_allclose(
        one_by_one.rows["memory"], batched.rows["memory"], rtol=1e-4, atol=1e-5
    )


def test_an_empty_log_trains_nothing(tmp_path: Path) -> None:
    trainer = train(CONFIG, InProcessMemory(NAMESPACE), EventLog(tmp_path))
    assert trainer.step == 0


def _distributed_worker(rank: int, world: int, log_path: str, out_path: str, port: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    owned = np.arange(NUM_BUCKETS)[rank::world]
    config = replace(CONFIG, batch_size=16)
    memory = InProcessMemory(NAMESPACE)  # users never cross workers, so each has its own rows
    reader = EventLog(Path(log_path)).reader(LogOffsets.start(), owned)
    collective = DistributedWorkers(torch.device("cpu"))
    trainer = StreamTrainer(config, memory, reader, collective, EVERYTHING)
    trainer.run(no_hooks())
    evaluation, days = evaluate(trainer), trainer.metrics.days.table(collective)
    save_checkpoint(trainer, Path(out_path) / "checkpoint", trainer.offsets)
    assert trainer.retrieval_metrics is not None
    counted = trainer.retrieval_metrics.shared_state()
    alike = {**weights(trainer), **{name: torch.from_numpy(of) for name, of in counted.items()}}
    torch.save((trainer.events_seen, alike, evaluation, days), f"{out_path}/rank-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_workers_keep_equal_replicas(log: EventLog, tmp_path: Path, free_port: int) -> None:
    args = (2, str(tmp_path / "log"), str(tmp_path), free_port)
    (tmp_path / "checkpoint").mkdir()
    mp.spawn(_distributed_worker, args=args, nprocs=2)
    seen, first, evaluation, days = torch.load(tmp_path / "rank-0.pt", weights_only=True)
    seen_too, second, _, _ = torch.load(tmp_path / "rank-1.pt", weights_only=True)
    assert seen == seen_too == 600
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=0, msg=name)
        assert torch.isfinite(tensor).all()

    # Their metrics are one, and any number of workers takes them over.
    alone = StreamTrainer(
        CONFIG, InProcessMemory(NAMESPACE), log.reader(log.end()), SingleWorker(), EVERYTHING
    )
    load_checkpoint(alone, tmp_path / "checkpoint")
    assert repr(evaluate(alone)) == repr(evaluation)
    assert repr(alone.metrics.days.table(alone.collective)) == repr(days)
    assert evaluation["retrieval"]["long_view"]["events"] == 600
    assert evaluation["cascading"]["long_view"]["windows"] > 0
