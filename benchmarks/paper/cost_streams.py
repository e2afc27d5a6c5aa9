"""Training streams of several methods over the same events with full histories, timed in turn."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.paper.datasets import Dataset
from benchmarks.paper.phases import PhaseClock, TimedMemory
from benchmarks.paper.trial import EventsInMemory
from cache_actors.event_log.offsets import LogOffsets
from marm.events import EventBatch
from marm.memory import Ack, Memory
from marm.memory_arrays import ArrayMemory
from marm.sequence import enters_sequence, raw_rows
from train.batcher import EventSource
from train.collective import SingleWorker
from train.config import TrainConfig
from train.metrics import EvaluationWindow
from train.stream import Hooks, StreamTrainer

_ACK_TIMEOUT_S = 120.0
_EVENTS_PER_SAVE = 1 << 12
_SAVES_UNDER_WAY = 8


@dataclass(frozen=True)
class CostPoint:
    """One method at one history length; medians over rounds, per event."""

    seconds: float  # by the clock
    cpu_s: float  # of all threads
    macs: float  # multiply-adds of matrix products, forward and backward
    rows_read: float
    bytes_read: float  # rows fetched from the memory
    bytes_saved: float  # the row that is written
    vector_bytes: float  # of it, the cached vectors


@dataclass(frozen=True)
class Slices:
    """How a measurement is cut: every stream trains a slice, in turn, round by round."""

    events: int  # of a slice
    rounds: int  # that count; the first one, before them, does not

    @property
    def total_events(self) -> int:
        """Events at the end of the log that are trained on."""
        return self.events * (self.rounds + 1)


def measure_costs(
    dataset: Dataset, configs: Mapping[str, TrainConfig], slices: Slices
) -> dict[str, CostPoint]:
    """Cost of every configuration on the last events of ``dataset``.

    All earlier events are in every memory before, as rows with random vectors: what a row says does
    not change what it costs.

    Raises:
        ValueError: when the log is shorter than the slices.
    """
    if slices.total_events >= len(dataset):
        raise ValueError(
            f"{slices.total_events:,} events are to be timed, but {dataset.name} has "
            f"{len(dataset):,}; time fewer rounds or smaller slices"
        )
    start = len(dataset) - slices.total_events
    past, timed = (
        dataset.events.take(slice(begin, end)) for begin, end in ((0, start), (start, None))
    )
    streams = {name: _Stream(config, past, timed) for name, config in configs.items()}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in configs}
    macs = {}
    for turn in range(slices.rounds + 1):
        for name, stream in streams.items():
            if turn == 0:
                # Counting costs time of its own, so it is done where nothing is timed.
                with FlopCounterMode(display=False) as counter:
                    stream.train(slices.events)
                macs[name] = counter.get_total_flops() / 2 / slices.events
            else:
                spent[name].append(stream.train(slices.events))
    return {
        name: streams[name].point(spent[name], macs[name], slices.total_events) for name in configs
    }


class _Stream:
    """One method's training, a slice at a time."""

    def __init__(self, config: TrainConfig, past: EventBatch, timed: EventBatch) -> None:
        torch.set_num_threads(config.num_threads)
        memory = ArrayMemory(config.namespace, config.history_length)
        fill(memory, past)
        self._row_dtype = config.namespace.row_dtype
        self._memory = TimedMemory(memory, PhaseClock())
        self._source = PausingSource(EventsInMemory(timed))
        self._trainer = StreamTrainer(
            config, self._memory, self._source, SingleWorker(), EvaluationWindow(1, 0)
        )

    def train(self, num_events: int) -> tuple[float, float]:
        """Seconds and CPU seconds per event of the next so many events."""
        self._source.left = num_events
        cpu_began, began = time.process_time(), time.perf_counter()
        self._trainer.run(Hooks.nothing())
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
        return seconds / num_events, cpu_s / num_events

    def point(self, spent: list[tuple[float, float]], macs: float, num_events: int) -> CostPoint:
        """Everything that was found."""
        seconds, cpu_s = np.median(np.array(spent), axis=0).tolist()
        rows_read = self._memory.rows_read / num_events
        row_bytes = self._row_dtype.itemsize
        vector_bytes = self._row_dtype["memory"].itemsize
        return CostPoint(
            seconds, cpu_s, macs, rows_read, rows_read * row_bytes, row_bytes, vector_bytes
        )


class PausingSource:
    """A source that pauses after so many events."""

    def __init__(self, source: EventSource) -> None:
        self._source = source
        self.left = 0

    @property
    def offsets(self) -> LogOffsets:
        """See `EventSource.offsets`."""
        return self._source.offsets

    def next(self, max_events: int) -> EventBatch | None:
        """See `EventSource.next`."""
        if self.left <= 0:
            return None
        events = self._source.next(min(max_events, self.left))
        self.left -= 0 if events is None else len(events)
        return events


def fill(memory: Memory, events: EventBatch, seed: int = 0) -> None:
    """Save ``events`` as rows that look computed, with random vectors; all are acknowledged."""
    namespace = memory.namespace
    rng = np.random.default_rng(seed)
    under_way: deque[Ack] = deque()
    for begin in range(0, len(events), _EVENTS_PER_SAVE):
        part = events.take(slice(begin, begin + _EVENTS_PER_SAVE))
        part = part.take(enters_sequence(part, namespace.sequence))
        rows = raw_rows(part, namespace.row_dtype)
        rows["memory"] = rng.standard_normal(rows["memory"].shape, np.float32)
        rows["written_step"] = 0
        under_way.append(memory.save(part.user_id, rows))
        while len(under_way) > _SAVES_UNDER_WAY:
            under_way.popleft().wait(_ACK_TIMEOUT_S)
    for ack in under_way:
        ack.wait(_ACK_TIMEOUT_S)
