"""What the parts of a training pass cost, in CPU seconds of the thread that does them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cache_actors.event_log.offsets import LogOffsets
from marm.config import ModelConfig
from marm.events import EventBatch
from marm.inputs import ModelInputs
from marm.memory import Ack, Memory, Namespace, UserRows
from marm.stage_model import StepOutput
from train.batcher import EventSource
from train.collective import Collective
from train.config import TrainConfig
from train.learner import Learner

PHASES = ("read", "fetch", "save", "predict", "learn")


class PhaseClock:
    """Adds up CPU time by phase. Each phase is timed by one thread at a time."""

    def __init__(self) -> None:
        self._nanoseconds = dict.fromkeys(PHASES, 0)

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Count the CPU time of the body, in this thread, to ``phase``."""
        began = time.thread_time_ns()
        try:
            yield
        finally:
            self._nanoseconds[phase] += time.thread_time_ns() - began

    def seconds(self) -> dict[str, float]:
        """CPU seconds so far by phase."""
        return {phase: spent / 1e9 for phase, spent in self._nanoseconds.items()}


class TimedSource:
    """A source whose reading is timed."""

    def __init__(self, source: EventSource, clock: PhaseClock) -> None:
        self._source, self._clock = source, clock

    @property
    def offsets(self) -> LogOffsets:
        """See `EventSource.offsets`."""
        return self._source.offsets

    def next(self, max_events: int) -> EventBatch | None:
        """See `EventSource.next`."""
        with self._clock.time("read"):
            return self._source.next(max_events)


class TimedMemory:
    """A memory whose reading and writing are timed, and the rows of whose answers are counted."""

    def __init__(self, memory: Memory, clock: PhaseClock) -> None:
        self._memory, self._clock = memory, clock
        self.rows_read = 0

    @property
    def namespace(self) -> Namespace:
        """See `Memory.namespace`."""
        return self._memory.namespace

    def fetch(
        self, user_ids: NDArray[np.int64], n: int, before_ms: NDArray[np.int64] | None = None
    ) -> UserRows:
        """See `Memory.fetch`."""
        with self._clock.time("fetch"):
            found = self._memory.fetch(user_ids, n, before_ms)
        self.rows_read += len(found.rows)
        return found

    def save(self, user_ids: NDArray[np.int64], rows: NDArray[np.void]) -> Ack:
        """See `Memory.save`."""
        with self._clock.time("save"):
            return self._memory.save(user_ids, rows)


class TimedLearner(Learner):
    """A learner whose steps are timed, and which keeps its predictions of the first task."""

    def __init__(
        self, model: ModelConfig, config: TrainConfig, collective: Collective, clock: PhaseClock
    ) -> None:
        super().__init__(model, config, collective)
        self._clock = clock
        self.scores: list[NDArray[np.float32]] = []  # in the order of the stream

    def predict(
        self, inputs: ModelInputs, labels_B: NDArray[np.float32], memory_BLD: Tensor | None
    ) -> StepOutput:
        """See `Learner.predict`."""
        with self._clock.time("predict"):
            output = super().predict(inputs, labels_B, memory_BLD)
        self.scores.append(output.scores_BT[:, 0].copy())
        return output

    def learn(self, labels_B: NDArray[np.float32], num_labels: int) -> None:
        """See `Learner.learn`."""
        with self._clock.time("learn"):
            super().learn(labels_B, num_labels)
