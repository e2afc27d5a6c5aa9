"""Metrics in a checkpoint: what every worker knows alone, and what all know alike."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.stream import StreamTrainer

_SHARED = "metrics-shared.npz"
_CLOSED_DAYS = "metrics-days.json"
_SAMPLE = "retrieval-sample"


def save_metrics(trainer: StreamTrainer, directory: Path) -> None:
    """Write this worker's part into ``directory``; worker 0 also what all workers share."""
    rank, retrieval = trainer.collective.rank, trainer.retrieval_metrics
    parts = trainer.metrics.state()
    if retrieval is not None:
        parts[_SAMPLE] = retrieval.sample.state()
    for name, arrays in parts.items():
        _write(directory / f"metrics-{name}-{rank}.npz", arrays)
    if rank != 0:
        return
    rows = {str(day): row for day, row in trainer.metrics.days.rows.items()}
    (directory / _CLOSED_DAYS).write_text(json.dumps(rows))
    if retrieval is not None:
        _write(directory / _SHARED, retrieval.shared_state())


def load_metrics(trainer: StreamTrainer, directory: Path, same_window: bool) -> None:
    """Continue the metrics of the checkpoint in ``directory``: worker 0 takes over what each of the
    workers knew.

    Args:
        trainer: its metrics are empty.
        directory: written by `save_metrics` of all workers.
        same_window: whether the checkpoint evaluates the same part of the log as ``trainer``.
    """
    rows = json.loads((directory / _CLOSED_DAYS).read_text())
    trainer.metrics.days.rows = {int(day): row for day, row in rows.items()}
    retrieval = trainer.retrieval_metrics
    shared = directory / _SHARED
    if retrieval is not None and shared.exists():
        retrieval.load_shared(_read(shared))
    if trainer.collective.rank != 0:
        return
    for rank in _ranks(directory):
        files = directory.glob(f"metrics-*-{rank}.npz")
        names = {
            path.stem.removeprefix("metrics-").removesuffix(f"-{rank}"): path for path in files
        }
        state: dict[str, Any] = {name: _read(path) for name, path in names.items()}
        trainer.metrics.extend(state, same_window)
        if retrieval is not None and same_window and _SAMPLE in state:
            retrieval.sample.extend(state[_SAMPLE])


def _ranks(directory: Path) -> list[int]:
    found = (re.fullmatch(r"metrics-late-(\d+)\.npz", path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in found if match)


def _write(path: Path, arrays: dict[str, NDArray]) -> None:
    np.savez(path, allow_pickle=False, **arrays)


def _read(path: Path) -> dict[str, NDArray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)
