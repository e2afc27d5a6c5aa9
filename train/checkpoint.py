"""Checkpoints: models, optimisers, log offsets and metrics of a moment at which every row computed
before those offsets is acknowledged by the memory.

Resuming replays the log from the offsets. Rows are upserted by event key and a fetch never sees
rows at or after the events it serves, so a replay changes nothing that was already right.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from cache_actors.event_log.offsets import LogOffsets
from marm.config import ModelConfig
from train.batcher import FeedState
from train.config import TrainConfig
from train.learner_file import load_learner_state, save_learner_state
from train.metrics_state import load_metrics, save_metrics
from train.stream import StreamTrainer

_STATE_FILE = "state.json"
_FORMAT = 4  # 3: before the loss had pairs, and other stages a map of errors


class CheckpointError(RuntimeError):
    """A checkpoint cannot be continued by this run; the message says why."""


def save_checkpoint(trainer: StreamTrainer, directory: Path, offsets: LogOffsets) -> None:
    """Write this worker's part into ``directory``; worker 0 writes what all workers share.

    Args:
        trainer: flushed, so that ``offsets`` are also the memory's watermark.
        directory: where to write.
        offsets: how far all workers together have learned and saved.
    """
    rank = trainer.collective.rank
    save_metrics(trainer, directory)
    np.savez_compressed(
        directory / f"feed-{rank}.npz", allow_pickle=False, **trainer.feed_state.to_arrays()
    )
    for learner in trainer.learners:
        learned = learner.state()  # where tables are sharded, everybody takes part
        if learned is not None:
            save_learner_state(learned, directory / f"{learner.stage}.safetensors")
    if rank != 0:
        return
    state = {
        "format": _FORMAT,
        "step": trainer.step,
        "events_seen": trainer.events_seen,
        "published_step": trainer.published_step,
        "started_s": trainer.started_s,
        "evaluated": asdict(trainer.metrics.evaluated),
        "log_offsets": offsets.to_dict(),
        "memory_watermark": {"namespace": trainer.config.namespace.name, "step": trainer.step},
        "models": [model.to_dict() for model in trainer.config.models],
    }
    (directory / _STATE_FILE).write_text(json.dumps(state))


def checkpoint_offsets(directory: Path, config: TrainConfig) -> LogOffsets:
    """Where the checkpoint in ``directory`` continues the log.

    Raises:
        CheckpointError: when it is not a checkpoint of the same models.
    """
    try:
        state = json.loads((directory / _STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} is not a readable checkpoint: {error}") from error
    if state.get("format") != _FORMAT:
        raise CheckpointError(
            f"expected checkpoint format {_FORMAT}, got {state.get('format')}; "
            "start a new run under another name"
        )
    differences = _differences(state["models"], config.models)
    if differences:
        raise CheckpointError(
            f"the checkpoint in {directory} is of models with other settings "
            f"({'; '.join(differences)}); continue with those settings, or start a new run under "
            "another name"
        )
    return LogOffsets.from_dict(state["log_offsets"])


def _differences(saved: list[dict[str, Any]], wanted: tuple[ModelConfig, ...]) -> list[str]:
    """What this run's models have other than a checkpoint's, setting by setting."""
    stages = [model["stage"] for model in saved]
    if stages != [model.stage for model in wanted]:
        return [f"stages: saved {stages}, now {[model.stage for model in wanted]}"]
    found = []
    for values, model in zip(saved, wanted, strict=True):
        now = json.loads(json.dumps(model.to_dict()))
        # A setting that is newer than the checkpoint had its default when that was written.
        then = {**json.loads(json.dumps(ModelConfig(stage=model.stage).to_dict())), **values}
        found += [
            f"{model.stage}: {name} was {then.get(name)}, is {now.get(name)}"
            for name in sorted(then.keys() | now.keys())
            if then.get(name) != now.get(name)
        ]
    return found


def load_checkpoint(trainer: StreamTrainer, directory: Path) -> None:
    """Continue ``trainer`` from the checkpoint in ``directory`` (see `checkpoint_offsets`)."""
    state = json.loads((directory / _STATE_FILE).read_text())
    for learner in trainer.learners:
        path = directory / f"{learner.stage}.safetensors"
        saved = load_learner_state(path, learner.held_rows)
        learner.load_state(saved)
    trainer.restore(
        state["step"],
        state["events_seen"],
        state["published_step"],
        _load_feed(trainer, directory),
        state.get("started_s", trainer.started_s),
    )
    load_metrics(trainer, directory, state["evaluated"] == asdict(trainer.metrics.evaluated))


def _load_feed(trainer: StreamTrainer, directory: Path) -> FeedState:
    """Every worker knows all times; worker 0 continues the counts of all."""
    parts = []
    for part in sorted(directory.glob("feed-*.npz")):
        with np.load(part, allow_pickle=False) as arrays:
            parts.append(dict(arrays))
    merged = FeedState.merge(parts)
    if trainer.collective.rank == 0:
        return merged
    return replace(merged, tallies=FeedState.start().tallies)
