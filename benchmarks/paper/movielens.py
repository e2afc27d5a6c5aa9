"""One test-then-train pass over a real log, through Ray Train and the real memory pool.

    python -m benchmarks.paper.movielens --data ratings.parquet --depth 2

Takes any Parquet with ``user_id``, ``item_id``, ``timestamp`` and ``label`` (the long-view task),
optionally ``genre`` (the tag); or a published MovieLens layout (``ratings.dat``, ``ratings.csv``).
Evaluates the last 20% of rows. Then the same training loop runs over an in-process numpy store, on
slices of the same events, in turn with the real pool: their ratio is what the pool costs.

The last line is JSON. Attention sees no time gaps: in reconstructed copies of MovieLens-1M the
clock of part of the log is bracketed, and the gaps give labels away (docs/decisions).
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet as pq
import ray
import torch

from benchmarks.paper.cost_streams import PausingSource
from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.home import Home
from cache_actors.pool.client import MemoryClient
from cache_actors.pool.lifecycle import start_pool, stop_pool
from cache_actors.pool.shard_link import PoolInfo
from marm.config import ModelConfig
from marm.memory import InProcessMemory, Memory, Namespace
from train.collective import SingleWorker
from train.config import TrainConfig
from train.data.ingest import ingest
from train.floor import item_mean_floor
from train.metrics import EvaluationWindow
from train.run import TrainingResult, evaluation_window, run_training
from train.stream import Hooks, StreamTrainer

TASK = "long_view"
EVALUATION_FRACTION = 0.2


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(argv)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        home = Home(Path(scratch) / "home").create()
        ray.init(
            num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING
        )
        try:
            load(home, options.data)
            config = training_config(options)
            pool = start_pool(home, options.shards)
            result = run_training(home, config)
            pool_rate, in_process_rate = throughput(home, config, pool, options)
            stop_pool(pool)
        finally:
            ray.shutdown()
        report(home, config, result, pool_rate, in_process_rate)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="Parquet file, ratings.dat or ratings.csv")
    parser.add_argument("--depth", type=int, default=2, help="L")
    parser.add_argument("--history", type=int, default=50, help="n")
    parser.add_argument("--dim", type=int, default=32, help="d")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--slice-events", type=int, default=40_000, help="events per timed slice")
    parser.add_argument("--slices", type=int, default=3, help="timed slices per store")
    parser.add_argument("--scratch", default=None, help="directory for the log and the memory")
    return parser.parse_args(argv)


def load(home: Home, data: str) -> None:
    """Ingest the data; a Parquet with other label columns is the user's to map and ingest."""
    if not data.endswith(".parquet"):
        ingest(home, "movielens", data)
        return
    columns = set(pq.ParquetFile(data).schema_arrow.names)
    mapping = {TASK: "label"}
    if "genre" in columns:
        mapping["tag_id"] = "genre"
    ingest(home, "parquet", data, mapping)


def training_config(options: argparse.Namespace) -> TrainConfig:
    namespace = Namespace(depth=options.depth, dim=options.dim)
    ranking = ModelConfig(
        namespace=namespace,
        depth=options.depth,
        history_length=options.history,
        attention_dim=options.dim,
        feature_dim=options.dim,
        tasks=(TASK,),
        feedback_signals=(TASK,),
        features=("item", "tag"),
        recency=("distance",),
    )
    return TrainConfig(
        models=(ranking,), seed=options.seed, evaluation_fraction=EVALUATION_FRACTION
    )


def throughput(
    home: Home, config: TrainConfig, pool: PoolInfo, options: argparse.Namespace
) -> tuple[float, float]:
    """Median events/s of the same loop over the pool and over numpy, in turn on equal slices.

    Both start empty; the first slice of each is not counted.
    """
    torch.set_num_threads(config.num_threads)
    # A namespace of its own, so that the pool starts as empty as the in-process store.
    namespace = replace(config.namespace, epoch=config.namespace.epoch + 1)
    model = replace(config.models[0], namespace=namespace)
    config = replace(config, models=(model,))
    rates: dict[str, list[float]] = {"pool": [], "in_process": []}
    with MemoryClient(pool, namespace) as client:
        stores: dict[str, Memory] = {"pool": client, "in_process": InProcessMemory(namespace)}
        streams = {
            name: SliceTrainer(home, config, store, options.slice_events)
            for name, store in stores.items()
        }
        for turn in range(options.slices + 1):
            for name, stream in streams.items():
                rate = stream.train_slice()
                if turn > 0:
                    rates[name].append(rate)
    return statistics.median(rates["pool"]), statistics.median(rates["in_process"])


class SliceTrainer:
    """Trains slice after slice of the log with one store."""

    def __init__(self, home: Home, config: TrainConfig, memory: Memory, slice_events: int) -> None:
        log = EventLog(home.log)
        reader = log.reader(LogOffsets.start())
        self._source = PausingSource(reader)
        self._trainer = StreamTrainer(
            config, memory, self._source, SingleWorker(), EvaluationWindow(1, 0)
        )
        self._slice_events = slice_events

    def train_slice(self) -> float:
        """Events/s of the next slice, from its first read to the acknowledgement of its rows."""
        self._source.left = self._slice_events
        before, started = self._trainer.events_seen, time.perf_counter()
        self._trainer.run(Hooks.nothing())
        return (self._trainer.events_seen - before) / (time.perf_counter() - started)


def report(
    home: Home, config: TrainConfig, result: TrainingResult, pool_rate: float, in_process: float
) -> None:
    log = EventLog(home.log)
    num_events = log.num_events()
    window = evaluation_window(log, num_events, config.evaluation_fraction)
    floor = item_mean_floor(log, TASK, window.from_ms)
    metrics = result.evaluation["ranking"][TASK]
    line = {
        "auc": round(metrics["auc"], 4),
        "gauc": round(metrics["gauc"], 4),
        "floor_auc": round(floor["auc"], 4),
        "floor_gauc": round(floor["gauc"], 4),
        "evaluated_events": int(metrics["events"]),
        "events": num_events,
        "hit_rate": round(result.hit_rate, 4),
        "run_events_per_s": round(result.events_per_s),
        "events_per_s": round(pool_rate),
        "in_process_events_per_s": round(in_process),
        "events_per_s_ratio": round(pool_rate / in_process, 3),
        "settings": {
            **{k: v for k, v in asdict(config).items() if k != "models"},
            "model": config.models[0].to_dict(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
