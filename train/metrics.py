"""Test-then-train metrics: every prediction was made before its label was learned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marm.events import TASKS, WATCH_TIME, EventBatch
from marm.metrics import auc, gauc, log_loss, xauc


@dataclass
class Predictions:
    """Predictions of one stage, task by task, with the labels that were observed later."""

    tasks: tuple[str, ...]
    user_ids: list[NDArray[np.int64]] = field(default_factory=list)
    labels: list[NDArray[np.float32]] = field(default_factory=list)
    scores: list[NDArray[np.float32]] = field(default_factory=list)

    def add(self, events: EventBatch, scores_BT: NDArray[np.float32]) -> None:
        """Add a batch."""
        columns = [TASKS.index(task) for task in self.tasks]
        self.user_ids.append(events.user_id)
        self.labels.append(events.labels[:, columns])
        self.scores.append(scores_BT)

    def extend(self, other: Predictions) -> None:
        """Add the predictions of another worker."""
        self.user_ids += other.user_ids
        self.labels += other.labels
        self.scores += other.scores

    def __len__(self) -> int:
        return sum(len(part) for part in self.user_ids)

    def arrays(self) -> dict[str, NDArray]:
        """All predictions in three arrays; `from_arrays` reads them back."""
        num_tasks = len(self.tasks)
        return {
            "user_ids": np.concatenate([np.empty(0, np.int64), *self.user_ids]),
            "labels": np.concatenate([np.empty((0, num_tasks), np.float32), *self.labels]),
            "scores": np.concatenate([np.empty((0, num_tasks), np.float32), *self.scores]),
        }

    @staticmethod
    def from_arrays(tasks: tuple[str, ...], arrays: dict[str, NDArray]) -> Predictions:
        """The predictions written by `arrays`."""
        return Predictions(tasks, [arrays["user_ids"]], [arrays["labels"]], [arrays["scores"]])

    def summarize(self) -> dict[str, dict[str, float]]:
        """Metrics of every task with an observed label: AUC, GAUC (Eq. 10), log loss and mean
        prediction over mean label (calibration); XAUC and mean absolute error of watch time."""
        merged = _in_canonical_order(self.arrays())
        return {
            task: _task_metrics(
                task,
                merged["user_ids"][observed],
                merged["labels"][observed, index],
                merged["scores"][observed, index],
            )
            for index, task in enumerate(self.tasks)
            if (observed := ~np.isnan(merged["labels"][:, index])).any()
        }


def _in_canonical_order(arrays: dict[str, NDArray]) -> dict[str, NDArray]:
    """Sorted, so that figures do not depend on which worker predicted what."""
    order = np.lexsort((*arrays["scores"].T, *arrays["labels"].T, arrays["user_ids"]))
    return {name: array[order] for name, array in arrays.items()}


def _task_metrics(
    task: str, user_ids: NDArray, labels: NDArray, scores: NDArray
) -> dict[str, float]:
    counts = {"events": float(len(labels)), "mean_label": float(labels.mean())}
    if task == WATCH_TIME:
        error = float(np.abs(labels - scores).mean())
        return {**counts, "xauc": xauc(labels, scores), "mean_absolute_error_s": error}
    metrics = {
        **counts,
        "auc": auc(labels, scores),
        "gauc": gauc(user_ids, labels, scores),
    }
    if scores.min() >= 0.0 and scores.max() <= 1.0:  # probabilities; a retrieval score is not one
        metrics["log_loss"] = log_loss(labels, scores)
        metrics["calibration"] = float(scores.mean() / max(labels.mean(), 1e-9))
    return metrics


@dataclass(frozen=True)
class EvaluationWindow:
    """The events whose predictions are kept, by time; bounded, so that a run that follows a
    growing log does not keep everything."""

    from_ms: int
    to_ms: int  # inclusive

    def contains(self, timestamps_ms: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the times are evaluated."""
        return (timestamps_ms >= self.from_ms) & (timestamps_ms <= self.to_ms)


class StreamingMetrics:
    """Predictions of all stages: a running window, and the evaluation part at the log's end.

    Memory grows with the evaluation part only: 8 bytes an event and 8 an event and task.
    """

    def __init__(
        self, tasks_of_stage: dict[str, tuple[str, ...]], window: EvaluationWindow
    ) -> None:
        self._tasks, self.evaluated = tasks_of_stage, window
        self.evaluation = {stage: Predictions(tasks) for stage, tasks in tasks_of_stage.items()}
        self._window = {stage: Predictions(tasks) for stage, tasks in tasks_of_stage.items()}

    def add(self, stage: str, events: EventBatch, scores_BT: NDArray[np.float32]) -> None:
        """Add one stage's predictions of a batch."""
        self._window[stage].add(events, scores_BT)
        evaluated = self.evaluated.contains(events.timestamp_ms)
        if evaluated.any():
            self.evaluation[stage].add(events.take(evaluated), scores_BT[evaluated])

    def window_events(self) -> int:
        """Events in the running window."""
        return max((len(part) for part in self._window.values()), default=0)

    def pop_window(self) -> dict[str, dict[str, dict[str, float]]]:
        """Metrics of the running window by stage and task; starts a new window."""
        summary = {stage: part.summarize() for stage, part in self._window.items()}
        self._window = {stage: Predictions(tasks) for stage, tasks in self._tasks.items()}
        return summary

    def state(self) -> dict[str, Any]:
        """The evaluation part, for a checkpoint."""
        return {stage: part.arrays() for stage, part in self.evaluation.items()}
