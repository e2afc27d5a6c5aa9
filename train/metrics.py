"""Test-then-train metrics: every prediction was made before its label was learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marm.events import EventBatch
from train.daily import DailyMetrics
from train.predictions import Figures, Predictions


@dataclass(frozen=True)
class EvaluationWindow:
    """The events whose predictions are kept, by time; bounded, so that a run that follows a
    growing log does not keep everything."""

    from_ms: int
    to_ms: int  # inclusive

    def contains(self, timestamps_ms: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the times are evaluated."""
        return (timestamps_ms >= self.from_ms) & (timestamps_ms <= self.to_ms)

    @property
    def is_empty(self) -> bool:
        """Whether no time is evaluated."""
        return self.to_ms < self.from_ms


class StreamingMetrics:
    """Predictions of all stages: a running window, the evaluation part at the log's end, and
    figures by day.

    Memory grows with the evaluation part only: 12 bytes an event and 8 an event and task.
    """

    def __init__(
        self, tasks_of_stage: dict[str, tuple[str, ...]], window: EvaluationWindow
    ) -> None:
        self._tasks, self.evaluated = tasks_of_stage, window
        self.evaluation = {stage: Predictions(tasks) for stage, tasks in tasks_of_stage.items()}
        self.days = DailyMetrics(tasks_of_stage)
        self._window = {stage: Predictions(tasks) for stage, tasks in tasks_of_stage.items()}

    def add(
        self, stage: str, events: EventBatch, scores_BT: NDArray[np.float32], step: int = 0
    ) -> None:
        """Add one stage's predictions of a batch, made in ``step``."""
        predictions = Predictions.of(self._tasks[stage], events, scores_BT)
        self._window[stage].extend(predictions)
        self.days.add(stage, predictions, step)
        evaluated = self.evaluated.contains(events.timestamp_ms)
        if evaluated.any():
            kept = predictions if evaluated.all() else predictions.take(evaluated)
            self.evaluation[stage].extend(kept)

    def window_events(self) -> int:
        """Events in the running window."""
        return max((len(part) for part in self._window.values()), default=0)

    def pop_window(self) -> dict[str, Figures]:
        """Figures of the running window by stage and task; starts a new window."""
        summary = {stage: part.summarize() for stage, part in self._window.items()}
        self._window = {stage: Predictions(tasks) for stage, tasks in self._tasks.items()}
        return summary

    def state(self) -> dict[str, dict[str, NDArray]]:
        """What this worker alone knows, by name, for a checkpoint: the evaluation part under the
        name of its stage, open days, and the number of late events."""
        late = np.array([self.days.late_events], np.int64)
        return {
            **{stage: part.arrays() for stage, part in self.evaluation.items()},
            **{f"days-{stage}": arrays for stage, arrays in self.days.state().items()},
            "late": {"late": late},
        }

    def extend(self, state: dict[str, Any], same_window: bool) -> None:
        """Take over the `state` of a worker of an interrupted run. Predictions of another
        evaluation window are left: a log that has grown is evaluated at its new end."""
        for stage, tasks in self._tasks.items():
            if same_window:
                self.evaluation[stage].extend(Predictions.from_arrays(tasks, state[stage]))
        self.days.extend({stage: state[f"days-{stage}"] for stage in self._tasks})
        self.days.late_events += int(state["late"]["late"][0])
