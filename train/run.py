"""Running training on a Ray cluster: `run_training` is what the command line calls."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.home import Home
from train.checkpoint import CheckpointError, checkpoint_offsets
from train.config import TrainConfig
from train.metrics import EvaluationWindow
from train.progress import Progress, read_progress
from train.table_memory import TableMemoryError, available_bytes, require_table_memory
from train.table_placement import MissingExtraError, require_placement
from train.worker import RunRequest, train_worker

_PROGRESS_POLL_S = 0.5
_READ_EVENTS = 1 << 16


class TrainingError(RuntimeError):
    """A run ended without finishing; the message says why and what to do."""


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run achieved."""

    events_seen: int
    step: int
    events_per_s: float
    versions: dict[str, int]  # published, by stage
    hit_rate: float  # share of the rows read that were memorised
    evaluation: dict[str, dict[str, dict[str, float]]]  # by stage and task
    screened: dict[str, int]  # events and labels that can't be right (see `train.screening`)
    log_problems: list[str]  # parts of the log that were damaged or missing, and skipped
    metrics_file: str = ""  # the evaluation, and figures of every day (`train.metrics_file`)


def run_training(
    home: Home,
    config: TrainConfig,
    run_name: str = "main",
    on_progress: Callable[[Progress], None] | None = None,
    pool: str = "default",
) -> TrainingResult:
    """Stream the log of ``home`` through Ray Train; needs an initialised Ray and a started pool,
    of which ``pool`` is the name.

    A run continues where the last one of the same name stopped: after a lost worker, and also when
    the log has grown since it finished.

    Raises:
        TrainingError: when the log is empty, or the run failed more often than allowed.
    """
    num_events = require_events(home, config)
    _require_extra(config)
    _require_devices(config)
    _require_table_memory(config)
    _require_same_models(home.runs / run_name, config)
    progress_path = home.runs / f"{run_name}.progress.json"
    progress_path.unlink(missing_ok=True)
    metrics_path = home.runs / f"{run_name}.metrics.json"
    metrics_path.unlink(missing_ok=True)
    log = EventLog(home.log)
    request = RunRequest(
        home.path,
        config,
        evaluation_window(log, num_events, config.evaluation_fraction),
        progress_path,
        metrics_path,
        pool,
    )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=request.to_dict(),
        torch_config=TorchConfig(backend="nccl" if config.device == "cuda" else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.device == "cuda",
            resources_per_worker={"CPU": config.num_threads},
        ),
        run_config=ray.train.RunConfig(
            name=run_name,
            storage_path=str(home.runs),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    with _Watcher(progress_path, on_progress):
        try:
            metrics: dict[str, Any] = trainer.fit().metrics or {}
        except ray.train.TrainingFailedError as error:
            raise TrainingError(
                f"training run {run_name!r} failed: {error}; it continues from its last "
                "checkpoint when started again"
            ) from error
    log.num_events()  # looks at what has come meanwhile, too
    return TrainingResult(
        int(metrics["events_seen"]),
        int(metrics["step"]),
        metrics["events_per_s"],
        metrics["versions"],
        metrics["hit_rate"],
        metrics["evaluation"],
        metrics["screened"],
        log.problems,
        str(metrics_path),
    )


def require_events(home: Home, config: TrainConfig) -> int:
    """Number of events in the log of ``home``.

    Raises:
        TrainingError: when there are none and the run would not wait for any.
    """
    num_events = EventLog(home.log).num_events()
    if num_events == 0 and not config.follow:
        raise TrainingError(
            f"the event log in {home.log} holds no events; fill it with `marm ingest` or "
            "`marm world` first"
        )
    return num_events


def _require_same_models(run_path: Path, config: TrainConfig) -> None:
    """A run continues its checkpoints, so its models must be theirs; workers would only retry."""
    for state in sorted(run_path.glob("checkpoint_*/state.json"))[-1:]:
        try:
            checkpoint_offsets(state.parent, config)
        except CheckpointError as error:
            raise TrainingError(str(error)) from error


def _require_extra(config: TrainConfig) -> None:
    """Workers would only retry what is not installed."""
    try:
        require_placement(config)
    except MissingExtraError as error:
        raise TrainingError(str(error)) from error


def _require_devices(config: TrainConfig) -> None:
    """Ray Train would wait for ever for a GPU that the cluster does not have."""
    num_gpus = ray.cluster_resources().get("GPU", 0)
    if config.device == "cuda" and num_gpus < config.num_workers:
        raise TrainingError(
            f"device 'cuda' needs one GPU per worker: {config.num_workers} workers, but the "
            f"cluster has {num_gpus:.0f} GPUs; lower num_workers, or train with device 'cpu'"
        )


def _require_table_memory(config: TrainConfig) -> None:
    """Where all workers are on this node, refuse tables that would not fit beside each other;
    workers elsewhere look for themselves."""
    num_nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    if config.device != "cpu" or num_nodes != 1:
        return
    try:
        require_table_memory(
            config.models, available_bytes(), config.num_workers, config.num_shards
        )
    except TableMemoryError as error:
        raise TrainingError(str(error)) from error


def evaluation_window(log: EventLog, num_events: int, fraction: float) -> EvaluationWindow:
    """The times of the last ``fraction`` of the events that the log holds now."""
    wanted = round(num_events * fraction)
    if wanted == 0:
        return EvaluationWindow(1, 0)  # nothing
    stamps = [batch.timestamp_ms for batch in log.read(LogOffsets.start(), max_events=_READ_EVENTS)]
    # Damaged segments count in the footers and are skipped here.
    readable = np.concatenate([np.empty(0, np.int64), *stamps])
    if not len(readable):
        return EvaluationWindow(1, 0)
    first = max(0, len(readable) - wanted)
    return EvaluationWindow(int(np.partition(readable, first)[first]), int(readable.max()))


class _Watcher:
    """Hands a run's progress to a callback until the run ends."""

    def __init__(self, path: Path, callback: Callable[[Progress], None] | None) -> None:
        self._path, self._callback = path, callback
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_PROGRESS_POLL_S):
            progress = read_progress(self._path)
            if progress is not None and self._callback is not None:
                self._callback(progress)
