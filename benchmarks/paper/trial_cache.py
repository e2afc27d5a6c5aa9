"""Finished trials on disk, so that an interrupted run goes on where it was.

A trial is one file, named by a digest of its data, its whole configuration and the code it depends
on (`benchmarks.paper.code_version`). A file is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.paper.code_version import code_version
from benchmarks.paper.trained_by import modules_of
from benchmarks.paper.trial import WINDOWS, Cost, Predictions, TrialResult
from cache_actors.atomic_files import pending_path
from marm.config import ModelConfig
from marm.model_factory import build_model
from train.config import TrainConfig

_DOCUMENT = "document"
_COLUMNS = tuple(field.name for field in fields(Predictions))
_REGISTRY = "marm.interest.methods"
_TRIAL = "benchmarks.paper.trial"


class TrialCache:
    """Results in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, data_fingerprint: str, config: TrainConfig) -> Path:
        """Where the result of a trial is, or is to be."""
        document = {
            "data": data_fingerprint,
            "train": config.to_dict(),
            "code": trial_code_version(config.models[0], modules_of(config)),
        }
        text = json.dumps(document, sort_keys=True)
        return self._directory / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"

    def load(self, path: Path) -> TrialResult | None:
        """The result that was written to ``path``; None when there is none."""
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as stored:
            document = json.loads(stored[_DOCUMENT].tobytes())
            windows = {
                name: Predictions(**{column: stored[f"{name}_{column}"] for column in _COLUMNS})
                for name in WINDOWS
            }
        return TrialResult(document["settings"], windows, Cost(**document["cost"]))

    def write(self, path: Path, result: TrialResult) -> None:
        """Keep a result."""
        document = {"settings": result.settings, "cost": asdict(result.cost)}
        arrays: dict[str, NDArray] = {
            _DOCUMENT: np.frombuffer(json.dumps(document).encode(), np.uint8)
        }
        for name, predictions in result.windows.items():
            arrays |= {f"{name}_{column}": getattr(predictions, column) for column in _COLUMNS}
        pending = pending_path(path.parent)
        try:
            with pending.open("xb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            pending.replace(path)
        finally:
            pending.unlink(missing_ok=True)


def trial_code_version(model: ModelConfig, more: Collection[str] = ()) -> str:
    """Digest of the code that a trial of ``model`` runs: of the methods, only those it has, and of
    ``more`` modules."""
    # Every width as small as the defaults of its tests would have it: classes are what counts.
    small = replace(model, num_slots=16)
    modules = {type(part).__module__ for part in build_model(small).modules()}
    return _code_version(frozenset({_TRIAL, *modules, *more}))


def remember_code() -> None:
    """Read the code of all trials now, as this process has just loaded it. Without this, code that
    is edited before the first trial is keyed would be taken for what runs."""
    code_version([_TRIAL])


@lru_cache
def _code_version(modules: frozenset[str]) -> str:
    return code_version(sorted(modules), not_followed=(_REGISTRY,))
