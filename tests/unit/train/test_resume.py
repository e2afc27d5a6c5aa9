"""A run that is killed, at whatever step, continues as if nothing had happened."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from marm.config import ModelConfig, TableConfig
from marm.events import TASKS, EventBatch
from marm.memory import InProcessMemory, Namespace, UserRows
from train.batcher import FeedState
from train.checkpoint import CheckpointError, checkpoint_offsets, load_checkpoint, save_checkpoint
from train.collective import SingleWorker
from train.config import TrainConfig, three_stages
from train.metrics import EvaluationWindow
from train.screening import BEFORE_1970, FUTURE, LABELS
from train.stream import Hooks, StreamTrainer

NAMESPACE = Namespace(depth=1, dim=4, dtype="float32")
RANKING = ModelConfig(
    namespace=NAMESPACE,
    depth=1,
    attention_dim=4,
    feature_dim=4,
    history_length=5,
    num_slots=256,
    num_experts=1,
    expert_dim=4,
    output_dim=4,
)
CHECKPOINT_EVERY = 2
CONFIG = TrainConfig(models=(RANKING,), batch_size=16, checkpoint_every_steps=CHECKPOINT_EVERY)
TABLES = {
    "hashed": TableConfig(),
    "admitted": TableConfig(kind="admitted", admit_after=2, keep_events=40),
}
ERRORS = replace(
    RANKING,
    namespace=Namespace("ranking_errors2", depth=2, dim=8, dtype="float32"),
    depth=2,
    error_layers=2,
    attention_dim=8,
)
RUNS = {
    **{name: replace(CONFIG, models=(replace(RANKING, table=TABLES[name]),)) for name in TABLES},
    "errors": replace(CONFIG, models=(ERRORS,)),
    "errors, all stages": replace(CONFIG, models=three_stages(ERRORS, 3, 5)),
}
NUM_USERS = 9
NUM_EVENTS = 110


def make_events(num_events: int, start_s: int, seed: int) -> EventBatch:
    rng = np.random.default_rng(seed)
    labels = (rng.random((num_events, len(TASKS))) < 0.4).astype(np.float32)
    return EventBatch(
        user_id=rng.integers(0, NUM_USERS, num_events),
        item_id=rng.integers(0, 60, num_events),
        timestamp_ms=(np.arange(num_events) + start_s) * 1000,
        event_key=rng.integers(0, 2**63, num_events).astype(np.uint64),
        author_id=rng.integers(1, 6, num_events),
        tag_id=rng.integers(1, 4, num_events),
        duration_ms=np.full(num_events, 15_000),
        context_id=np.zeros(num_events, np.int32),
        labels=labels,
    )


def write_log(path: Path) -> EventLog:
    """A log in three segments: the second begins before the first ends, so that events are late,
    and a few are impossible."""
    log = EventLog(path)
    log.append(make_events(40, 1000, 0))
    odd = make_events(42, 1025, 1)
    odd.timestamp_ms[5], odd.timestamp_ms[6] = 1 << 60, -5
    odd.labels[7, 0], odd.labels[7, -1] = 7.0, -1.0
    log.append(odd)
    log.append(make_events(30, 1070, 2))
    return log


class DiedError(Exception):
    """Stands for the end of a process."""


def start(config: TrainConfig, log: EventLog, memory: InProcessMemory) -> StreamTrainer:
    reader = log.reader(LogOffsets.start())
    return StreamTrainer(config, memory, reader, SingleWorker(), EvaluationWindow(0, 1 << 62))


def no_hooks() -> Hooks:
    return Hooks(lambda: None, lambda: None, lambda: None)


def train_until(
    config: TrainConfig, log: EventLog, memory: InProcessMemory, died_at: int, directory: Path
) -> list[Path]:
    """Train, with checkpoints, and die after ``died_at`` steps; the checkpoints."""
    trainer, checkpoints = start(config, log, memory), []

    def checkpoint() -> None:
        path = directory / str(trainer.step)
        path.mkdir()
        save_checkpoint(trainer, path, trainer.offsets)
        checkpoints.append(path)

    def die() -> None:
        if trainer.step == died_at:
            raise DiedError

    with pytest.raises(DiedError):
        trainer.run(Hooks(checkpoint, lambda: None, die))
    return checkpoints


def continue_run(
    config: TrainConfig, log: EventLog, memory: InProcessMemory, checkpoints: list[Path]
) -> StreamTrainer:
    """From the last checkpoint, or from the start where there is none."""
    trainer = start(config, log, memory)
    if checkpoints:
        reader = log.reader(checkpoint_offsets(checkpoints[-1], config))
        trainer = StreamTrainer(
            config, memory, reader, SingleWorker(), EvaluationWindow(0, 1 << 62)
        )
        load_checkpoint(trainer, checkpoints[-1])
    trainer.run(no_hooks())
    return trainer


def stored(memory: InProcessMemory) -> UserRows:
    found = memory.fetch(np.arange(NUM_USERS), 1000)
    found.rows["written_s"] = 0
    return found


def scores(trainer: StreamTrainer) -> dict[str, NDArray]:
    return {
        stage: predictions.arrays()["scores"]
        for stage, predictions in trainer.metrics.evaluation.items()
    }


def assert_equal_runs(run: StreamTrainer, expected: StreamTrainer) -> None:
    assert (run.step, run.events_seen) == (expected.step, expected.events_seen)
    assert run.offsets == expected.offsets
    assert run.feed_state.tallies == expected.feed_state.tallies
    for stage, wanted in scores(expected).items():
        np.testing.assert_array_equal(scores(run)[stage], wanted, err_msg=stage)
    for learner, other in zip(run.learners, expected.learners, strict=True):
        wanted_state = other.model.state_dict()
        for name, tensor in learner.model.state_dict().items():
            assert torch.equal(tensor, wanted_state[name]), name


@pytest.mark.parametrize("kind", sorted(RUNS))
def test_killed_at_every_step(kind: str, tmp_path: Path) -> None:
    """Late events are the hard part: their rows were not there when the lost steps began. So are
    layers of errors, in which a row adds up all that came before it."""
    config = RUNS[kind]
    log = write_log(tmp_path / "log")
    whole_memory = InProcessMemory(config.namespace)
    whole = start(config, log, whole_memory)
    whole.run(no_hooks())
    assert whole.events_seen == NUM_EVENTS
    tallies = whole.feed_state.tallies
    assert (tallies[FUTURE], tallies[BEFORE_1970], tallies[LABELS]) == (1, 1, 2)
    for died_at in range(1, whole.step):
        memory = InProcessMemory(config.namespace)
        directory = tmp_path / str(died_at)
        directory.mkdir()
        checkpoints = train_until(config, log, memory, died_at, directory)
        run = continue_run(config, log, memory, checkpoints)
        assert_equal_runs(run, whole)
        assert stored(memory).rows.tobytes() == stored(whole_memory).rows.tobytes()


def test_a_checkpoint_of_another_configuration_says_what_differs(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log")
    trainer = start(CONFIG, log, InProcessMemory(NAMESPACE))
    save_checkpoint(trainer, tmp_path, trainer.offsets)
    assert checkpoint_offsets(tmp_path, CONFIG) == LogOffsets.start()
    for changed, message in (
        ({"history_length": 6}, r"ranking: history_length was 5, is 6"),
        ({"table": TABLES["admitted"]}, r"ranking: table was .*hashed.*, is .*admitted"),
    ):
        other = replace(CONFIG, models=(replace(RANKING, **changed),))
        with pytest.raises(CheckpointError, match=f"other settings .{message}.*another name"):
            checkpoint_offsets(tmp_path, other)
    with pytest.raises(CheckpointError, match=r"stages: saved \['ranking'\], now \['ranking', 'c"):
        checkpoint_offsets(tmp_path, replace(CONFIG, models=three_stages(RANKING)))


def test_a_setting_newer_than_a_checkpoint_had_its_default(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log")
    trainer = start(CONFIG, log, InProcessMemory(NAMESPACE))
    save_checkpoint(trainer, tmp_path, trainer.offsets)
    state = json.loads((tmp_path / "state.json").read_text())
    del state["models"][0]["table"]
    (tmp_path / "state.json").write_text(json.dumps(state))
    checkpoint_offsets(tmp_path, CONFIG)
    admitted = replace(CONFIG, models=(replace(RANKING, table=TABLES["admitted"]),))
    with pytest.raises(CheckpointError, match="other settings"):
        checkpoint_offsets(tmp_path, admitted)


def test_a_log_that_ends_inside_a_segment(tmp_path: Path) -> None:
    """What is whole is learned, the torn segment is named, and the run goes on after it."""
    log = write_log(tmp_path / "log")
    last = tmp_path / "log" / "segments" / "000000000003.parquet"
    last.write_bytes(last.read_bytes()[:-40])
    memory = InProcessMemory(NAMESPACE)
    trainer = start(CONFIG, log, memory)
    trainer.run(no_hooks())
    assert trainer.events_seen == 80
    (problem,) = log.problems
    assert "000000000003.parquet" in problem
    assert "torn" in problem
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    save_checkpoint(trainer, directory, trainer.offsets)
    log.append(make_events(30, 2000, 3))
    later = continue_run(CONFIG, log, memory, [directory])
    assert later.events_seen == 110
    assert later.offsets == log.end()


def test_workers_of_another_number_continue_the_feed() -> None:
    first, second = FeedState.start(), FeedState.start()
    first.clocks_ms[3], second.clocks_ms[4] = 50, 60
    first.tallies[LABELS], second.tallies[LABELS] = 2, 5
    merged = FeedState.merge([first.to_arrays(), second.to_arrays()])
    assert merged.clocks_ms[[3, 4]].tolist() == [50, 60]
    assert merged.tallies[LABELS] == 7
    with pytest.raises(ValueError, match="another version"):
        FeedState.merge([{**first.to_arrays(), "tallies": np.zeros(1)}])
