"""What one Ray Train worker does: join the others, continue from the last checkpoint, stream."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.home import Home
from cache_actors.pool.client import MemoryClient
from cache_actors.pool.lifecycle import connect_pool
from marm.addressing import NUM_BUCKETS
from train.checkpoint import checkpoint_offsets, load_checkpoint, save_checkpoint
from train.collective import Collective, DistributedWorkers, SingleWorker
from train.config import TrainConfig
from train.daily import DayTable
from train.evaluation import evaluate
from train.metrics import EvaluationWindow
from train.metrics_file import MetricsReport, write_metrics
from train.predictions import Figures
from train.progress import Progress, write_progress
from train.publish import publish_versions
from train.stream import Hooks, StreamTrainer
from train.table_memory import device_bytes, require_table_memory

_PROGRESS_INTERVAL_S = 0.5


@dataclass(frozen=True)
class RunRequest:
    """A run as the driver asks workers for it."""

    home: Path
    config: TrainConfig
    evaluated: EvaluationWindow
    progress_path: Path
    metrics_path: Path
    pool: str = "default"
    started_s: int = field(default_factory=lambda: int(time.time()))  # for all attempts

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as Ray Train hands them to workers."""
        return {
            "home": str(self.home),
            "config": self.config.to_dict(),
            "evaluated": asdict(self.evaluated),
            "progress_path": str(self.progress_path),
            "metrics_path": str(self.metrics_path),
            "pool": self.pool,
            "started_s": self.started_s,
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> RunRequest:
        """The request written by `to_dict`."""
        return RunRequest(
            Path(values["home"]),
            TrainConfig.from_dict(values["config"]),
            EvaluationWindow(**values["evaluated"]),
            Path(values["progress_path"]),
            Path(values["metrics_path"]),
            values["pool"],
            values["started_s"],
        )


def train_worker(request_values: dict[str, Any]) -> None:
    """Entry point of every worker (`ray.train` calls it)."""
    request = RunRequest.from_dict(request_values)
    torch.set_num_threads(request.config.num_threads)
    context = ray.train.get_context()
    collective: Collective = SingleWorker()
    if context.get_world_size() > 1:
        collective = DistributedWorkers(torch.device(request.config.device))
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        _run(request, collective, None)
        return
    with checkpoint.as_directory() as directory:
        _run(request, collective, Path(directory))


def _run(request: RunRequest, collective: Collective, resume_from: Path | None) -> None:
    home, config = Home(request.home), request.config
    owned = np.arange(NUM_BUCKETS)[collective.rank :: collective.world_size]
    offsets = LogOffsets.start()
    if resume_from is not None:
        offsets = checkpoint_offsets(resume_from, config)
    reader = EventLog(home.log).reader(offsets, owned)
    require_table_memory(
        config.models,
        device_bytes(config.device),
        num_shards=config.num_shards,
        num_gathering=int(collective.rank == 0),
    )
    pool = connect_pool(home, name=request.pool)
    with MemoryClient(pool, config.namespace) as memory:
        trainer = StreamTrainer(config, memory, reader, collective, request.evaluated)
        trainer.started_s = request.started_s
        if resume_from is not None:
            load_checkpoint(trainer, resume_from)
        reporter = _Reporter(request, trainer, home, owned)
        trainer.run(Hooks(reporter.checkpoint, reporter.publish, reporter.progress))
        reporter.finish(memory.stats().fetched.hit_rate)


class _Reporter:
    """The hooks of a run: checkpoints and metrics to Ray Train, versions to the registry."""

    def __init__(
        self, request: RunRequest, trainer: StreamTrainer, home: Home, owned: np.ndarray
    ) -> None:
        self._request, self._trainer, self._home, self._owned = request, trainer, home, owned
        self._is_first = trainer.collective.rank == 0
        self._started_s = self._shown_s = time.monotonic()
        self._started_events = trainer.events_seen
        self._window: dict[str, dict[str, dict[str, float]]] = {}
        self._versions: dict[str, int] = {}

    def checkpoint(self) -> None:
        """Report a checkpoint, and figures of the days that are over; a barrier for all workers."""
        self._report(self._rates())
        self._write_metrics({}, self._trainer.metrics.days.closed())

    def _report(self, metrics: dict[str, Any]) -> None:
        offsets = self._all_offsets()
        with tempfile.TemporaryDirectory() as directory:
            save_checkpoint(self._trainer, Path(directory), offsets)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(directory))

    def publish(self) -> None:
        """Publish versions from worker 0, which has or gathers what all have learned."""
        offsets = self._all_offsets()
        collective = self._trainer.collective
        newest_event_ms = max(collective.gather(self._trainer.feed_state.newest_ms))
        self._versions = publish_versions(self._trainer, self._home, offsets, newest_event_ms)

    def progress(self) -> None:
        """Now and then, show how far worker 0 has got."""
        metrics = self._trainer.metrics
        if metrics.window_events() >= self._request.config.metrics_window:
            self._window = metrics.pop_window()
        now = time.monotonic()
        if not self._is_first or now - self._shown_s < _PROGRESS_INTERVAL_S:
            return
        self._shown_s = now
        rates = self._rates()
        progress = Progress(
            int(rates["events_seen"]), int(rates["step"]), rates["events_per_s"], self._window
        )
        write_progress(self._request.progress_path, progress)

    def finish(self, hit_rate: float) -> None:
        """Report the last checkpoint, with the evaluation over all workers and the share of rows
        that were memorised; write the metrics with all days."""
        collective = self._trainer.collective
        evaluation = evaluate(self._trainer)
        self._write_metrics(evaluation, self._trainer.metrics.days.table(collective))
        hit_rates = collective.gather(hit_rate)
        summary: dict[str, Any] = {
            **self._rates(),
            "versions": self._versions,
            "hit_rate": float(np.mean(hit_rates)),
            "screened": _add_up(collective.gather(self._trainer.feed_state.tallies)),
            "evaluation": evaluation,
        }
        self._report(summary)

    def _write_metrics(self, total: dict[str, Figures], days: DayTable) -> None:
        metrics, collective = self._trainer.metrics, self._trainer.collective
        late_events = sum(collective.gather(metrics.days.late_events))
        if self._is_first:
            window = metrics.evaluated
            evaluated_ms = None if window.is_empty else (window.from_ms, window.to_ms)
            report = MetricsReport(evaluated_ms, total, days, late_events)
            write_metrics(self._request.metrics_path, report)

    def _all_offsets(self) -> LogOffsets:
        collective = self._trainer.collective
        parts = collective.gather((self._trainer.offsets.to_dict(), self._owned.tolist()))
        return LogOffsets.merge(
            [LogOffsets.from_dict(offsets) for offsets, _ in parts], [owned for _, owned in parts]
        )

    def _rates(self) -> dict[str, float]:
        seen = self._trainer.events_seen
        elapsed = max(time.monotonic() - self._started_s, 1e-9)
        return {
            "events_seen": seen,
            "step": self._trainer.step,
            "events_per_s": (seen - self._started_events) / elapsed,
        }


def _add_up(parts: list[dict[str, int]]) -> dict[str, int]:
    return {name: sum(part[name] for part in parts) for name in parts[0]}
