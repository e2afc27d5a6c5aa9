"""Trials of several methods and seeds, in this process or in several, each result kept on disk."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from benchmarks.paper.datasets import Dataset
from benchmarks.paper.trial import TrialResult, run_trial
from benchmarks.paper.trial_cache import TrialCache
from cache_actors.atomic_files import pending_path
from marm.events import EventBatch
from marm.metrics import gauc
from train.config import TrainConfig


@dataclass(frozen=True)
class Trial:
    """One pass to be run: a name for people, and the configuration (with its seed)."""

    name: str
    config: TrainConfig


def run_trials(
    dataset: Dataset, trials: Sequence[Trial], scratch: Path, jobs: int = 1
) -> list[TrialResult]:
    """The results of ``trials``, in their order; those found in ``scratch`` are not run again.

    Prints a line for each as it is finished. With several jobs every process has the events in
    memory of its own.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    cache = TrialCache(scratch / "trials")
    data = dataset.fingerprint()
    paths = [cache.path(data, trial.config) for trial in trials]
    results = {path: found for path in paths if (found := cache.load(path)) is not None}
    missing = dict(zip(paths, trials, strict=True))
    for path, result in results.items():
        _show(missing.pop(path), result, "from disk")
    run = _in_this_process if jobs == 1 or len(missing) <= 1 else _in_processes
    for place, path in enumerate(run(dataset, missing, scratch, jobs), start=1):
        found = cache.load(path)
        assert found is not None, "a finished trial is on disk"
        results[path] = found
        _show(missing[path], found, f"{place} of {len(missing)}")
    return [results[path] for path in paths]


def _in_this_process(
    dataset: Dataset, missing: dict[Path, Trial], scratch: Path, jobs: int
) -> Iterator[Path]:
    threads = torch.get_num_threads()
    cache = TrialCache(scratch / "trials")
    try:
        for path, trial in missing.items():
            cache.write(path, run_trial(dataset, trial.config))
            yield path
    finally:
        torch.set_num_threads(threads)


def _in_processes(
    dataset: Dataset, missing: dict[Path, Trial], scratch: Path, jobs: int
) -> Iterator[Path]:
    file = write_dataset(dataset, scratch)
    # Forking a process in which torch has run may deadlock; a fresh one imports everything anew.
    executor = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    try:
        futures = [
            executor.submit(_run_and_write, file, trial.config, path)
            for path, trial in missing.items()
        ]
        for future in as_completed(futures):
            yield future.result()
    finally:
        executor.shutdown(cancel_futures=True)


_loaded: dict[Path, Dataset] = {}  # in a worker process: the events it reads once


def _run_and_write(file: Path, config: TrainConfig, path: Path) -> Path:
    cache = TrialCache(path.parent)
    if file not in _loaded:
        _loaded[file] = read_dataset(file)
        if cache.path(_loaded[file].fingerprint(), config) != path:
            raise RuntimeError(
                "the code of a trial changed after the program began; start it again: finished "
                "trials of code that is as it was are not repeated"
            )
    cache.write(path, run_trial(_loaded[file], config))
    return path


def write_dataset(dataset: Dataset, scratch: Path) -> Path:
    """Put a data set where other processes can read it; returns the file."""
    path = scratch / f"events-{dataset.fingerprint()[:24]}.npz"
    if path.is_file():
        return path
    scratch.mkdir(parents=True, exist_ok=True)
    columns = {field.name: getattr(dataset.events, field.name) for field in fields(EventBatch)}
    texts = {
        name: np.array(getattr(dataset, name), np.str_)
        for name in ("name", "sequence", "features", "feedback_signals", "recency")
    }
    pending = pending_path(scratch)
    try:
        with pending.open("xb") as file:
            np.savez(
                file,
                allow_pickle=False,
                test=dataset.test,
                tuning=dataset.tuning,
                **columns,
                **texts,
            )
        pending.replace(path)
    finally:
        pending.unlink(missing_ok=True)
    return path


def read_dataset(path: Path) -> Dataset:
    """The data set of `write_dataset`."""
    with np.load(path, allow_pickle=False) as stored:
        events = EventBatch(**{field.name: stored[field.name] for field in fields(EventBatch)})
        return Dataset(
            str(stored["name"]),
            events,
            stored["test"],
            stored["tuning"],
            features=tuple(stored["features"].tolist()),
            feedback_signals=tuple(stored["feedback_signals"].tolist()),
            recency=tuple(stored["recency"].tolist()),
            sequence=str(stored["sequence"]),
        )


def _show(trial: Trial, result: TrialResult, note: str) -> None:
    found, cost = result.windows["test"], result.cost
    quality = gauc(found.user_id, found.label, found.score)
    print(
        f"{trial.name}, seed {trial.config.seed}: GAUC {quality:.4f}, {cost.seconds:,.0f} s, "
        f"{cost.events_per_s:,.0f} events/s, {cost.cpu_s:,.0f} CPU s ({note})",
        flush=True,
    )
