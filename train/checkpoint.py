"""Checkpoints: models, optimisers, log offsets and metrics of a moment at which every row computed
before those offsets is acknowledged by the memory.

Resuming replays the log from the offsets. Rows are upserted by event key and a fetch never sees
rows at or after the events it serves, so a replay changes nothing that was already right.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cache_actors.event_log.offsets import LogOffsets
from train.config import TrainConfig
from train.learner_file import load_learner_state, save_learner_state
from train.metrics import Predictions
from train.stream import StreamTrainer

_STATE_FILE = "state.json"
_FORMAT = 2


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
    for stage, arrays in trainer.metrics.state().items():
        np.savez(directory / f"metrics-{stage}-{rank}.npz", allow_pickle=False, **arrays)
    if rank != 0:
        return
    for learner in trainer.learners:
        save_learner_state(learner.state(), directory / f"{learner.stage}.safetensors")
    state = {
        "format": _FORMAT,
        "step": trainer.step,
        "events_seen": trainer.events_seen,
        "published_step": trainer.published_step,
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
    models = json.loads(json.dumps([model.to_dict() for model in config.models]))
    if state["models"] != models:
        raise CheckpointError(
            f"the checkpoint in {directory} is of models with other settings; continue with those "
            "settings, or start a new run under another name"
        )
    return LogOffsets.from_dict(state["log_offsets"])


def load_checkpoint(trainer: StreamTrainer, directory: Path) -> None:
    """Continue ``trainer`` from the checkpoint in ``directory`` (see `checkpoint_offsets`)."""
    state = json.loads((directory / _STATE_FILE).read_text())
    for learner in trainer.learners:
        saved = load_learner_state(directory / f"{learner.stage}.safetensors")
        learner.load_state(saved)
    trainer.restore(state["step"], state["events_seen"], state["published_step"])
    # A log that has grown is evaluated at its new end; predictions of another window do not mix.
    same_window = state["evaluated"] == asdict(trainer.metrics.evaluated)
    if trainer.collective.rank == 0 and same_window:
        _load_metrics(trainer, directory)


def _load_metrics(trainer: StreamTrainer, directory: Path) -> None:
    """Worker 0 takes over the evaluation of all workers of the interrupted run."""
    for stage, predictions in trainer.metrics.evaluation.items():
        for part in sorted(directory.glob(f"metrics-{stage}-*.npz")):
            with np.load(part, allow_pickle=False) as arrays:
                predictions.extend(Predictions.from_arrays(predictions.tasks, dict(arrays)))
