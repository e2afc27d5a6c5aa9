"""Does a trainer's memory stay flat? RSS over a stream that never repeats itself.

Events are made up on the fly: a fixed number of users, and items without end, most of which come
once. Everything that could grow with the stream is in the process: batches, tables, metrics and a
store that is bounded by rows per user. The last line is JSON.

    python -m benchmarks.perf.trainer_memory --output trainer_memory.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.perf.figures import write_result
from cache_actors.event_log.offsets import LogOffsets
from marm.config import ModelConfig, TableConfig
from marm.events import TASKS, EventBatch
from marm.memory import InProcessMemory, Namespace
from train.collective import SingleWorker
from train.config import TrainConfig, three_stages
from train.metrics import EvaluationWindow
from train.stream import Hooks, StreamTrainer

_STATM = Path("/proc/self/statm")
_MIB = 1 << 20
START_MS = 1_600_000_000_000
GAP_MS = 2_000
"""43,200 events a day: predictions are kept for some days."""
REGULARS = 2_000
"""Items that come again and again."""


@dataclass(frozen=True)
class Settings:
    """Size of the measurement."""

    events: int = 10_000_000
    every: int = 500_000  # events between two looks at the memory
    users: int = 2_000
    history: int = 20
    dim: int = 16
    slots: int = 1 << 16
    batch_size: int = 512
    table: str = "admitted"
    new_items: float = 0.5  # share of events on an item never seen before
    seed: int = 0


class EndlessItems:
    """An event source of ``settings.events`` made-up events."""

    offsets = LogOffsets.start()

    def __init__(self, settings: Settings) -> None:
        self._settings, self._given = settings, 0
        self._rng = np.random.default_rng(settings.seed)

    def next(self, max_events: int) -> EventBatch | None:
        """The next events; their items are new ones, or some of the regular ones."""
        count = min(max_events, self._settings.events - self._given)
        if count <= 0:
            return None
        number = self._given + np.arange(count, dtype=np.int64)
        self._given += count
        rng = self._rng
        regular = rng.zipf(1.2, count) % REGULARS
        item = np.where(rng.random(count) < self._settings.new_items, REGULARS + number, regular)
        labels = (rng.random((count, len(TASKS))) < 0.3).astype(np.float32)
        labels[:, -1] = rng.exponential(20.0, count)
        return EventBatch(
            user_id=rng.integers(0, self._settings.users, count),
            item_id=item,
            timestamp_ms=START_MS + number * GAP_MS,
            event_key=number.astype(np.uint64),
            author_id=item // 7,
            tag_id=item % 31,
            duration_ms=np.full(count, 15_000, np.int64),
            context_id=np.zeros(count, np.int32),
            labels=labels,
        )


@dataclass
class MemoryLog:
    """Resident memory as the stream goes on; also takes the running metrics, as a worker does."""

    every: int
    metrics_window: int
    events: list[int] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)

    def look(self, trainer: StreamTrainer) -> None:
        """Note the memory when it is time."""
        if trainer.metrics.window_events() >= self.metrics_window:
            trainer.metrics.pop_window()
        if trainer.events_seen < self.every * (len(self.events) + 1):
            return
        gc.collect()
        self.events.append(trainer.events_seen)
        self.rss_mib.append(round(resident_bytes() / _MIB, 1))
        print(f"{trainer.events_seen:>12,} events {self.rss_mib[-1]:>9.1f} MiB", flush=True)

    def growth_mib_per_million(self) -> float | None:
        """Slope over the second half, when everything bounded is full; None for too few looks."""
        half = len(self.events) // 2
        if len(self.events) - half < 2:
            return None
        slope = np.polyfit(np.array(self.events[half:]) / 1e6, self.rss_mib[half:], 1)[0]
        return round(float(slope), 2)


def resident_bytes() -> int:
    """Memory of this process that is in use now, in bytes (Linux)."""
    return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def training(settings: Settings) -> TrainConfig:
    """All stages on one bounded table."""
    ranking = ModelConfig(
        namespace=Namespace(depth=1, dim=settings.dim, dtype="float32"),
        depth=1,
        attention_dim=settings.dim,
        feature_dim=settings.dim,
        history_length=settings.history,
        num_slots=settings.slots,
        table=TableConfig(kind=settings.table, keep_events=settings.every),
    )
    models = three_stages(ranking, settings.history, settings.history)
    return TrainConfig(
        models=models,
        batch_size=settings.batch_size,
        metrics_window=10_000,
        checkpoint_every_steps=50,
        max_ahead_s=None,  # ten million events last into the future
    )


def measure(settings: Settings) -> dict[str, object]:
    """Train on the whole stream; what the last line says."""
    torch.set_num_threads(1)
    config = training(settings)
    memory = InProcessMemory(config.namespace, max_rows_per_user=settings.history)
    nothing = EvaluationWindow(1, 0)
    trainer = StreamTrainer(config, memory, EndlessItems(settings), SingleWorker(), nothing)
    log = MemoryLog(settings.every, config.metrics_window)
    started = time.perf_counter()
    trainer.run(Hooks(lambda: None, lambda: None, lambda: log.look(trainer)))
    return {
        "growth_mib_per_million_events": log.growth_mib_per_million(),
        "events": log.events,
        "rss_mib": log.rss_mib,
        "events_per_s": round(trainer.events_seen / (time.perf_counter() - started)),
        "settings": asdict(settings),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--output", default=None, help="file for the result, as JSON")
    options = vars(parser.parse_args())
    output = options.pop("output")
    write_result(json.dumps(measure(replace(Settings(), **options))), output)


if __name__ == "__main__":
    main()
