"""What all programs of the paper's experiments are asked, and how they leave their results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarks.paper.datasets import (
    Dataset,
    item_mean_floor,
    load_dataset,
    users_with_both_labels,
)
from benchmarks.paper.plan import WITH_ERRORS, CommonSettings, Method, parse_method
from benchmarks.paper.trained_by import modules_of
from benchmarks.paper.trial import WINDOWS, Predictions, TrialResult
from benchmarks.paper.trial_cache import remember_code, trial_code_version
from benchmarks.paper.trial_pool import Trial, run_trials
from benchmarks.perf.figures import data_name
from cache_actors.atomic_files import replace_text
from train.config import TrainConfig

_BY_DEFAULT = CommonSettings()


def common_options(program: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options of every experiment."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.paper.{program}", description=description.splitlines()[0]
    )
    parser.add_argument(
        "--data", required=True, help="Parquet copy, published layout, or world[:SETTING=VALUE,..]"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs with the seeds 0, 1, ...")
    parser.add_argument("--out", default=None, help="directory for JSON, Markdown and plot")
    parser.add_argument("--scratch", default=None, help="keep finished trials here, and resume")
    parser.add_argument("--limit", type=int, default=None, help="only the first so many events")
    parser.add_argument("--window", choices=WINDOWS, default="test", help="what is evaluated")
    parser.add_argument("--history", type=int, default=_BY_DEFAULT.history_length, help="n")
    parser.add_argument("--dim", type=int, default=_BY_DEFAULT.dim, help="d")
    parser.add_argument("--top-k", type=int, default=_BY_DEFAULT.top_k, help="rows a search keeps")
    parser.add_argument("--batch-size", type=int, default=_BY_DEFAULT.batch_size)
    return parser


def trial_options(program: str, description: str) -> argparse.ArgumentParser:
    """The same for programs whose trials are independent of each other."""
    parser = common_options(program, description)
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time, each one thread")
    return parser


def ask_for_memory(parser: argparse.ArgumentParser) -> None:
    """Options of programs that look into the memory of one method."""
    parser.add_argument(
        "--method",
        choices=("marm", WITH_ERRORS),
        default="marm",
        help="whose layers are stored: outputs of attention, or what errors add up to",
    )
    parser.add_argument("--depth", type=int, default=2, help="L, at least 1")


def method_with_memory(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Method:
    """The method that `ask_for_memory` asked for."""
    if options.depth < 1:
        parser.error(f"--depth must be at least 1, as nothing is stored at 0; got {options.depth}")
    return parse_method(f"{options.method}_l{options.depth}")


def program_of(program: str, variant: str, usual: str = "marm") -> str:
    """A name for each variant's files, where several are left in one directory."""
    return program if variant == usual else f"{program}_{variant}"


class Experiment:
    """A program's data and settings; runs its trials and writes what it found. A context."""

    def __init__(self, program: str, options: argparse.Namespace) -> None:
        if options.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {options.seeds}")
        remember_code()  # before the data is loaded, which takes a while
        self.program, self._options = program, options
        self.window: str = options.window
        self.seeds = range(options.seeds)
        self.common = CommonSettings(
            options.history, options.dim, options.top_k, options.batch_size
        )
        self.dataset: Dataset = load_dataset(options.data, options.limit)
        self.floor = item_mean_floor(self.dataset, self.window)
        self._users = users_with_both_labels(self.dataset, self.window)
        self._codes: dict[str, str] = {}
        self._began = time.monotonic()
        self._left = ExitStack()
        print(
            f"{self.dataset.name}: {len(self.dataset):,} events, "
            f"{int(self.dataset.window(self.window).sum()):,} evaluated, {self._users:,} users "
            f"with both labels; running item mean: AUC {self.floor['auc']:.4f}, "
            f"GAUC {self.floor['gauc']:.4f}",
            flush=True,
        )

    def __enter__(self) -> Experiment:
        self.scratch = Path(
            self._options.scratch
            or self._left.enter_context(tempfile.TemporaryDirectory(prefix="marm-paper-"))
        ).expanduser()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._left.close()

    def config(self, method: Method, seed: int = 0) -> TrainConfig:
        """A method under the common settings."""
        return self.common.train_config(self.dataset, method, seed)

    def run(self, trials: Sequence[Trial]) -> list[TrialResult]:
        """See `run_trials`."""
        for trial in trials:
            model, more = trial.config.models[0], modules_of(trial.config)
            self._codes[trial.name] = trial_code_version(model, more)
        return run_trials(self.dataset, trials, self.scratch, self._options.jobs)

    def run_seeds(self, configs: dict[str, TrainConfig]) -> dict[str, list[TrialResult]]:
        """Every configuration with every seed, by its name; all with one seed before the next."""
        trials = [
            Trial(name, seeded(config, seed))
            for seed in self.seeds
            for name, config in configs.items()
        ]
        results = self.run(trials)
        return {
            name: [
                result for trial, result in zip(trials, results, strict=True) if trial.name == name
            ]
            for name in configs
        }

    def predictions(self, results: Sequence[TrialResult]) -> list[Predictions]:
        """Of the window that is evaluated."""
        return [result.windows[self.window] for result in results]

    def document(self, found: dict[str, Any]) -> dict[str, Any]:
        """What was found, with all that it was found with."""
        typical = self.config(parse_method("marm_l2"))
        return {
            "program": self.program,
            **found,
            "floor": {name: round(value, 4) for name, value in self.floor.items()},
            "evaluated_events": int(self.dataset.window(self.window).sum()),
            "evaluated_users": self._users,
            "settings": {
                "data": self.dataset.name,
                "source": data_name(self._options.data),
                "num_events": len(self.dataset),
                "window": self.window,
                "seeds": len(self.seeds),
                "jobs": vars(self._options).get("jobs", 1),
                "limit": self._options.limit,
                "common": asdict(self.common),
                "features": self.dataset.features,
                "feedback_signals": self.dataset.feedback_signals,
                "recency": self.dataset.recency,
                "sequence": self.dataset.sequence,
                "marm_l2": typical.to_dict(),
            },
            "code": self._codes or {"marm_l2": trial_code_version(typical.models[0])},
            "machine": {
                "cpus": os.cpu_count(),
                "architecture": platform.machine(),
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            "elapsed_s": round(time.monotonic() - self._began, 1),
        }

    def out(self, suffix: str) -> Path | None:
        """Where a result goes, named by program and data; None when none is wanted."""
        if self._options.out is None:
            return None
        directory = Path(self._options.out).expanduser()
        directory.mkdir(parents=True, exist_ok=True)
        return directory / f"{self.program}-{self.dataset.name}{suffix}"

    def finish(self, document: dict[str, Any], markdown: str) -> None:
        """Write both where that was asked for; print the table, and the JSON as the last line."""
        text, table = self.out(".json"), self.out(".md")
        if text is not None and table is not None:
            replace_text(text, json.dumps(document, indent=1) + "\n")
            replace_text(table, markdown)
        print(markdown)
        print(json.dumps(document), flush=True)


def seeded(config: TrainConfig, seed: int) -> TrainConfig:
    """The same with another seed."""
    return replace(config, seed=seed)
