"""Our DIN against FuxiCTR's, on the same events in the same order.

FuxiCTR (https://github.com/reczoo/FuxiCTR) runs in a virtual environment of its own, from PyPI:
`benchmarks.perf.training_cost.fuxictr_side`. Both models predict a batch, then learn it, in one
pass.

What both see: the user, the target's item and tag, and the newest n earlier events of the user with
item, tag and label. What differs: FuxiCTR's DIN concatenates features of ``embedding_dim`` each,
pools without recency, and learns everything by Adam at one learning rate, the best of a grid on the
events before the evaluated ones. Ours adds features up in one width d, has a recency bias and the
running mean of the target's item as an input, and its own defaults everywhere: among them pairs of
a user's events in the loss (`marm.pairwise`). A pass without those, by log loss alone as FuxiCTR
learns, is reported beside it.

Events per second are per CPU second, so that other work on the machine counts for neither side.
FuxiCTR's are those of its `train_step` alone: converting data and predicting are free. Ours are of
the whole loop: reading, fetching and saving rows, building inputs, predicting and learning.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.paper.datasets import Dataset, item_mean_floor
from benchmarks.paper.plan import CommonSettings, parse_method
from benchmarks.paper.trial import TrialResult, run_trial
from benchmarks.perf.figures import Figure, Measured, at_least
from benchmarks.perf.timing import Ratio
from marm.metrics import gauc
from train.config import TrainConfig

_DIFFERENCE, _EVENTS_RATIO = -0.002, 2.0
_SIDE = Path(__file__).with_name("fuxictr_side.py")
_INSTALL_TIMEOUT_S = 3_600.0
_PASS_TIMEOUT_S = 7_200.0


@dataclass(frozen=True)
class FuxictrSettings:
    """What is compared. An exact release of torch, as ranges may pick builds for GPUs."""

    fuxictr: str = "2.3.10"
    torch: str = "2.13.0"
    history_length: int = 50
    dim: int = 32
    batch_size: int = 256
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
    dnn_hidden_units: tuple[int, ...] = (512, 128, 64)  # the documented defaults of its DIN
    attention_hidden_units: tuple[int, ...] = (64,)
    attention_activation: str = "Dice"
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class _Pass:
    """One pass of either side."""

    tuning_gauc: float
    test_gauc: float
    events_per_cpu_s: float
    events_per_s: float


def measure_fuxictr(
    dataset: Dataset, settings: FuxictrSettings, venv: Path, scratch: Path
) -> Measured:
    """Both sides, seed by seed; makes ``venv`` where it is not there yet."""
    python = ensure_venv(venv, settings)
    events = scratch / "events.npz"
    export(dataset, events)
    theirs = {
        rate: [
            _their_pass(dataset, settings, python, events, rate, seed) for seed in settings.seeds
        ]
        for rate in settings.learning_rates
    }
    best = max(theirs, key=lambda rate: _mean([one.tuning_gauc for one in theirs[rate]]))
    common = CommonSettings(settings.history_length, settings.dim, batch_size=settings.batch_size)
    configs = [common.train_config(dataset, parse_method("din"), seed) for seed in settings.seeds]
    ours = [_our_pass(run_trial(dataset, config)) for config in configs]
    plain = [_our_pass(run_trial(dataset, by_log_loss_alone(config))) for config in configs]
    measured = _summary(ours, plain, theirs, best)
    measured.medians["item_mean_gauc"] = item_mean_floor(dataset)["gauc"]
    return measured


def by_log_loss_alone(config: TrainConfig) -> TrainConfig:
    """The same run without pairs of a user's events in its loss."""
    return replace(config, models=(replace(config.models[0], pairwise_weight=0.0),))


def ensure_venv(venv: Path, settings: FuxictrSettings) -> Path:
    """The Python of a virtual environment that has FuxiCTR; made by pip where it is missing.

    Raises:
        RuntimeError: when pip fails; the message is pip's.
    """
    python, wanted = venv / "bin" / "python", json.dumps([settings.fuxictr, settings.torch])
    stamp = venv / "fuxictr-installed.json"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"installing FuxiCTR {settings.fuxictr} in {venv} (minutes)", flush=True)
    packages = [f"torch=={settings.torch}", f"fuxictr=={settings.fuxictr}"]
    for command in (
        [sys.executable, "-m", "venv", str(venv)],
        [str(python), "-m", "pip", "install", "--quiet", *packages],
    ):
        _run(command, _INSTALL_TIMEOUT_S)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def export(dataset: Dataset, path: Path) -> None:
    """The events as small numbers: 1, 2, ... of every user, item and tag, and the label; -1 where
    it was not observed. ``past`` counts the user's earlier events."""
    events = dataset.events
    labels = np.where(np.isnan(dataset.labels), -1, dataset.labels)
    np.savez(
        path,
        allow_pickle=False,
        user=_numbered(events.user_id),
        item=_numbered(events.item_id),
        tag=_numbered(events.tag_id),
        label=labels.astype(np.int8),
        past=strict_predecessors(events.user_id, events.timestamp_ms),
    )


def strict_predecessors(
    users: NDArray[np.int64], timestamps_ms: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Events of the same user with a smaller time, of events in time order."""
    order = np.argsort(users, kind="stable")
    user, stamp = users[order], timestamps_ms[order]
    place = np.arange(len(order))
    starts_user = np.append(True, user[1:] != user[:-1])[: len(order)]
    starts_moment = starts_user | np.append(True, stamp[1:] != stamp[:-1])[: len(order)]
    first_of_user = np.maximum.accumulate(np.where(starts_user, place, 0))
    first_of_moment = np.maximum.accumulate(np.where(starts_moment, place, 0))
    past = np.empty(len(order), np.int64)
    past[order] = first_of_moment - first_of_user
    return past


def _their_pass(
    dataset: Dataset,
    settings: FuxictrSettings,
    python: Path,
    events: Path,
    learning_rate: float,
    seed: int,
) -> _Pass:
    scores = events.with_name("scores.npy")
    request = {**asdict(settings), "learning_rate": learning_rate, "seed": seed}
    # Isolated: this directory's modules are not to be found before its packages.
    command = [str(python), "-I", str(_SIDE), str(events), str(scores), json.dumps(request)]
    found: dict[str, Any] = json.loads(_run(command, _PASS_TIMEOUT_S).splitlines()[-1])
    tuning, test = _gaucs(dataset, np.load(scores, allow_pickle=False))
    result = _Pass(
        tuning,
        test,
        found["trained_events"] / found["cpu_s"],
        found["trained_events"] / found["elapsed_s"],
    )
    print(f"FuxiCTR's DIN, learning rate {learning_rate:g}, seed {seed}: {result}", flush=True)
    return result


def _our_pass(trial: TrialResult) -> _Pass:
    by_window = [trial.windows[name] for name in ("tuning", "test")]
    tuning, test = (gauc(one.user_id, one.label, one.score) for one in by_window)
    result = _Pass(tuning, test, trial.cost.events_per_cpu_s, trial.cost.events_per_s)
    print(f"our DIN: {result}", flush=True)
    return result


def _gaucs(dataset: Dataset, scores: NDArray[np.float32]) -> tuple[float, float]:
    """Of the windows ``tuning`` and ``test``."""
    users, labels = dataset.events.user_id, dataset.labels
    tuning, test = (dataset.window(name) for name in ("tuning", "test"))
    return (
        gauc(users[tuning], labels[tuning], scores[tuning]),
        gauc(users[test], labels[test], scores[test]),
    )


def _summary(
    ours: list[_Pass], plain: list[_Pass], theirs: dict[float, list[_Pass]], best: float
) -> Measured:
    differences, plain_differences = (
        [own.test_gauc - other.test_gauc for own, other in zip(of, theirs[best], strict=True)]
        for of in (ours, plain)
    )
    ratios = [
        own.events_per_cpu_s / other.events_per_cpu_s
        for own, other in zip(ours, theirs[best], strict=True)
    ]
    figures = (
        Figure(
            "fuxictr_gauc_difference",
            f"GAUC of our DIN minus that of FuxiCTR's, whose learning rate is {best:g}; mean of "
            f"{len(ours)} seed(s), quartiles over seeds",
            _over_seeds(differences),
            at_least(_DIFFERENCE),
        ),
        Figure(
            "fuxictr_gauc_difference_log_loss_alone",
            "the same, of our DIN without pairs of a user's events in its loss",
            _over_seeds(plain_differences),
        ),
        Figure(
            "fuxictr_events_ratio",
            "events per CPU second: our whole loop over its train_step alone",
            _over_seeds(ratios),
            at_least(_EVENTS_RATIO),
        ),
        Figure(
            "fuxictr_events_ratio_by_clock",
            "events per second: our loop, which prepares data in a second thread, over the same",
            _over_seeds(
                [
                    own.events_per_s / other.events_per_s
                    for own, other in zip(ours, theirs[best], strict=True)
                ]
            ),
        ),
    )
    medians = {
        "our_din_gauc": _mean([one.test_gauc for one in ours]),
        "our_din_log_loss_alone_gauc": _mean([one.test_gauc for one in plain]),
        "our_din_events_per_cpu_s": _mean([one.events_per_cpu_s for one in ours]),
    }
    for rate, passes in theirs.items():
        medians[f"fuxictr_din_gauc_lr_{rate:g}"] = _mean([one.test_gauc for one in passes])
        medians[f"fuxictr_din_events_per_cpu_s_lr_{rate:g}"] = _mean(
            [one.events_per_cpu_s for one in passes]
        )
    return Measured(figures, medians)


def _over_seeds(values: list[float]) -> Ratio:
    lower, upper = np.quantile(values, [0.25, 0.75])
    return Ratio(_mean(values), float(lower), float(upper))


def _mean(values: list[float]) -> float:
    return float(np.mean(values))


def _numbered(ids: NDArray[np.int64]) -> NDArray[np.int32]:
    return (np.unique(ids, return_inverse=True)[1] + 1).astype(np.int32)


def _run(command: list[str], timeout_s: float) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as ours
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).splitlines()[-20:])
        raise RuntimeError(f"{' '.join(command[:3])} failed ({done.returncode}):\n{tail}")
    return done.stdout
