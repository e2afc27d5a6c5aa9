"""What rows kept in float16 or int8 do to a ranking model, against rows kept in float32.

    python -m benchmarks.perf.row_formats

A model is trained on the simulated world with rows of each dtype: GAUC of the last part of the log,
every event predicted before it is learned. Then the weights of the float32 run are frozen and the
log is replayed once per dtype, each replay writing and reading a memory of its own, so that errors
carry from row to row as they do in use. On the last part of the log every replay is compared with
the float32 one: the relative L2 error of each layer's attention (before the residual) and of its
output y_i, the change of predicted probabilities, and of GAUC. ``one_read`` is the error of a
single read: the float32 memory, rounded once. Layer 1 reads no stored vector, so its error is 0.

Beside it: bytes of a stored row, and what encoding and decoding cost. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.perf.row_errors import Difference, FrozenModel, Reading
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.store.row_formats import as_read, decode_into, encode
from cache_actors.transfer.convert import convert_rows
from marm.config import ModelConfig
from marm.events import BINARY_TASKS, EventBatch
from marm.memory import InProcessMemory, Namespace, UserRows
from marm.sequence import raw_rows
from train.batcher import Batcher
from train.collective import SingleWorker
from train.config import TrainConfig
from train.data.world import World
from train.data.world_config import WorldConfig
from train.learner import Learner
from train.metrics import EvaluationWindow
from train.stream import Hooks, StreamTrainer

EXACT, DTYPES = "float32", ("float16", "int8")
KINDS = ("one_read", "carried")
EVALUATED_FRACTION = 0.2
TASK = "long_view"
COST_ROWS, COST_REPEATS = 1024, 101


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(argv)
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    results = [measure(options, seed) for seed in range(options.seeds)]
    report(options, results, time.perf_counter() - started)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=9_000)
    parser.add_argument("--users", type=int, default=90)
    parser.add_argument("--items", type=int, default=800)
    parser.add_argument("--depth", type=int, default=4, help="L")
    parser.add_argument("--dim", type=int, default=32, help="D")
    parser.add_argument("--history", type=int, default=50, help="n")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of the dense half")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace, seed: int) -> dict[str, float]:
    """All figures of one seed: of the world and of the weights."""
    events = EventBatch.concat(list(World(world_config(options, seed)).stream()))
    config = training_config(options, seed)
    from_ms = int(np.quantile(events.timestamp_ms, 1 - EVALUATED_FRACTION))
    trainers = {dtype: train(config, dtype, events, from_ms) for dtype in (EXACT, *DTYPES)}
    trained = {
        f"{dtype}.trained.gauc": trainer.metrics.evaluation["ranking"].summarize()[TASK]["gauc"]
        for dtype, trainer in trainers.items()
    }
    return trained | replay_errors(trainers[EXACT].learners[0], events, config, from_ms)


def world_config(options: argparse.Namespace, seed: int) -> WorldConfig:
    return WorldConfig(
        num_users=options.users, num_items=options.items, num_events=options.events, seed=seed
    )


def training_config(options: argparse.Namespace, seed: int) -> TrainConfig:
    model = ModelConfig(
        namespace=Namespace(depth=options.depth, dim=options.dim, dtype=EXACT),
        depth=options.depth,
        history_length=options.history,
        attention_dim=options.dim,
        feature_dim=options.dim,
        tasks=BINARY_TASKS,
    )
    return TrainConfig(
        models=(model,),
        batch_size=options.batch_size,
        dense_learning_rate=options.learning_rate,
        seed=seed,
    )


def train(config: TrainConfig, dtype: str, events: EventBatch, from_ms: int) -> StreamTrainer:
    """Train with rows of ``dtype``, keeping the predictions from ``from_ms`` on."""
    namespace = replace(config.namespace, dtype=dtype)
    config = replace(config, models=(replace(config.models[0], namespace=namespace),))
    window = EvaluationWindow(from_ms, int(events.timestamp_ms[-1]))
    source = EventsInOrder(events)
    trainer = StreamTrainer(config, InProcessMemory(namespace), source, SingleWorker(), window)
    trainer.run(Hooks.nothing())
    return trainer


class EventsInOrder:
    """An event source over events that are already in time order."""

    offsets = LogOffsets.start()

    def __init__(self, events: EventBatch) -> None:
        self._events, self._taken = events, 0

    def next(self, max_events: int) -> EventBatch | None:
        part = self._events.take(slice(self._taken, self._taken + max_events))
        self._taken += len(part)
        return part if len(part) else None


def replay_errors(
    learner: Learner, events: EventBatch, config: TrainConfig, from_ms: int
) -> dict[str, float]:
    """Replay ``events`` with every dtype side by side; figures of those from ``from_ms`` on."""
    spaces = {dtype: replace(config.namespace, dtype=dtype) for dtype in (EXACT, *DTYPES)}
    memories = {dtype: InProcessMemory(space) for dtype, space in spaces.items()}
    differences = {
        f"{dtype}.{kind}": Difference(BINARY_TASKS, TASK) for dtype in DTYPES for kind in KINDS
    }
    model = FrozenModel(learner)
    batcher = Batcher(EventsInOrder(events), config.batch_size)
    while (micro_batch := batcher.next()) is not None:
        batch = micro_batch.events
        users, first_ms = first_moments(batch)
        fetched = {
            dtype: memory.fetch(users, config.history_length, first_ms)
            for dtype, memory in memories.items()
        }
        readings = {dtype: model.read(batch, rows) for dtype, rows in fetched.items()}
        for dtype, reading in readings.items():
            save(memories[dtype], batch, reading)
        kept = batch.timestamp_ms >= from_ms
        if kept.any():
            for dtype in DTYPES:
                once = model.read(batch, rounded(fetched[EXACT], spaces[EXACT], spaces[dtype]))
                for kind, reading in (("one_read", once), ("carried", readings[dtype])):
                    differences[f"{dtype}.{kind}"].add(batch, kept, readings[EXACT], reading)
    found = {}
    for name, difference in differences.items():
        found.update({f"{name}.{key}": value for key, value in difference.figures().items()})
    return found


def first_moments(batch: EventBatch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Distinct users of a batch and when each of them first appears in it."""
    users, position = np.unique(batch.user_id, return_inverse=True)
    first_ms = np.full(len(users), np.iinfo(np.int64).max)
    np.minimum.at(first_ms, position, batch.timestamp_ms)
    return users, first_ms


def rounded(rows: UserRows, exact: Namespace, space: Namespace) -> UserRows:
    """``rows`` as they would be read from a memory of another dtype."""
    stored = as_read(space, convert_rows(rows.rows, exact, space))
    return UserRows(rows.user_ids, rows.offsets, stored)


def save(memory: InProcessMemory, batch: EventBatch, reading: Reading) -> None:
    rows = raw_rows(batch, memory.namespace.row_dtype)
    rows["memory"], rows["written_step"] = reading.rows_BLD, 0
    memory.save(batch.user_id, as_read(memory.namespace, rows))


def format_costs() -> dict[str, dict[str, float]]:
    """Bytes of a stored row, and the median time for a number to get in and out of one."""
    rng, found = np.random.default_rng(0), {}
    for dtype in (EXACT, *DTYPES):
        namespace = Namespace(depth=4, dim=64, dtype=dtype)
        rows = np.zeros(COST_ROWS, namespace.row_dtype)
        rows["memory"] = rng.normal(size=rows["memory"].shape)
        stored, out = encode(namespace, rows), rows.copy()
        found[dtype] = {
            "stored_row_bytes": stored.dtype.itemsize,
            "encode_ns": median_ns(partial(encode, namespace, rows)) / rows["memory"].size,
            "decode_ns": median_ns(partial(decode_into, namespace, stored, out))
            / rows["memory"].size,
        }
    return found


def median_ns(call: Callable[[], object]) -> float:
    times = []
    for _ in range(COST_REPEATS):
        started = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - started)
    return float(np.median(times))


def report(options: argparse.Namespace, results: list[dict[str, float]], seconds: float) -> None:
    """A line per figure, then one line of JSON."""
    title = f"figure ({len(results)} seeds)"
    print(f"{title:<40}{'median':>12}{'least':>12}{'largest':>12}")
    for name in results[0]:
        values = [result[name] for result in results]
        row = (float(np.median(values)), min(values), max(values))
        print(f"{name:<40}" + "".join(f"{value:>12.3g}" for value in row))
    costs = format_costs()
    for dtype, cost in costs.items():
        print(
            f"{dtype}: {cost['stored_row_bytes']} bytes a row (L=4, D=64), a number takes "
            f"{cost['encode_ns']:.2f} ns to encode, {cost['decode_ns']:.2f} ns to decode"
        )
    line = {
        "costs": {
            dtype: {name: round(value, 3) for name, value in cost.items()}
            for dtype, cost in costs.items()
        },
        "figures": {name: [float(f"{r[name]:.5g}") for r in results] for name in results[0]},
        "settings": {
            **vars(options),
            "world": asdict(world_config(options, 0)),
            "model": training_config(options, 0).models[0].to_dict(),
            "evaluated_fraction": EVALUATED_FRACTION,
            "task": TASK,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "seconds": round(seconds, 1),
        },
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
