"""Predictions with the labels that were observed later, and the figures of each task."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from marm.events import TASKS, WATCH_TIME, EventBatch
from marm.metrics import auc, calibration, gauc, log_loss, xauc

MS_PER_DAY = 86_400_000

MAX_PAIRS, PAIRS_PER_EVENT = 100_000, 100
"""How many random pairs XAUC looks at: fewer where few events are, as on a single day."""

Figures = dict[str, dict[str, float]]
"""Figures by task."""


def day_of(timestamps_ms: NDArray[np.int64]) -> NDArray[np.int32]:
    """The day of each time, in UTC, counted from 1970-01-01."""
    bounds = np.iinfo(np.int32)  # a wrong clock gives a wrong day, not that of somebody else
    return np.clip(timestamps_ms // MS_PER_DAY, bounds.min, bounds.max).astype(np.int32)


@dataclass
class Predictions:
    """Predictions of one stage, task by task: 12 bytes an event and 8 an event and task."""

    tasks: tuple[str, ...]
    user_ids: list[NDArray[np.int64]] = field(default_factory=list)
    days: list[NDArray[np.int32]] = field(default_factory=list)
    labels: list[NDArray[np.float32]] = field(default_factory=list)
    scores: list[NDArray[np.float32]] = field(default_factory=list)

    @staticmethod
    def of(
        tasks: tuple[str, ...], events: EventBatch, scores_BT: NDArray[np.float32]
    ) -> Predictions:
        """The predictions of one batch."""
        columns = [TASKS.index(task) for task in tasks]
        days = day_of(events.timestamp_ms)
        return Predictions(
            tasks, [events.user_id], [days], [events.labels[:, columns]], [scores_BT]
        )

    def add(self, events: EventBatch, scores_BT: NDArray[np.float32]) -> None:
        """Add a batch."""
        self.extend(Predictions.of(self.tasks, events, scores_BT))

    def extend(self, other: Predictions) -> None:
        """Add other predictions, as those of another worker; arrays are shared, not copied."""
        self.user_ids += other.user_ids
        self.days += other.days
        self.labels += other.labels
        self.scores += other.scores

    def take(self, mask: NDArray[np.bool_]) -> Predictions:
        """The predictions where ``mask`` is true, in order."""
        arrays = {name: array[mask] for name, array in self.arrays().items()}
        return Predictions.from_arrays(self.tasks, arrays)

    def __len__(self) -> int:
        return sum(len(part) for part in self.user_ids)

    def arrays(self) -> dict[str, NDArray]:
        """All predictions in four arrays; `from_arrays` reads them back."""
        num_tasks = len(self.tasks)
        return {
            "user_ids": np.concatenate([np.empty(0, np.int64), *self.user_ids]),
            "days": np.concatenate([np.empty(0, np.int32), *self.days]),
            "labels": np.concatenate([np.empty((0, num_tasks), np.float32), *self.labels]),
            "scores": np.concatenate([np.empty((0, num_tasks), np.float32), *self.scores]),
        }

    @staticmethod
    def from_arrays(tasks: tuple[str, ...], arrays: dict[str, NDArray]) -> Predictions:
        """The predictions written by `arrays`."""
        names = ("user_ids", "days", "labels", "scores")
        return Predictions(tasks, *([arrays[name]] for name in names))

    def summarize(self) -> Figures:
        """Figures of every task with an observed label: AUC, GAUC (Eq. 10), log loss and mean
        prediction over mean label (calibration); XAUC and mean absolute error of watch time."""
        merged = self.arrays()
        return {
            task: _task_figures(
                task,
                merged["user_ids"][observed],
                merged["labels"][observed, index],
                merged["scores"][observed, index],
            )
            for index, task in enumerate(self.tasks)
            if (observed := ~np.isnan(merged["labels"][:, index])).any()
        }


def _task_figures(
    task: str, user_ids: NDArray, labels: NDArray, scores: NDArray
) -> dict[str, float]:
    # Sorted, so that figures do not depend on which worker predicted what.
    order = np.lexsort((scores, labels, user_ids))
    user_ids, labels, scores = user_ids[order], labels[order], scores[order]
    counts = {"events": float(len(labels)), "mean_label": float(labels.mean(dtype=np.float64))}
    if task == WATCH_TIME:
        error = float(np.abs(labels - scores).mean(dtype=np.float64))
        pairs = min(MAX_PAIRS, PAIRS_PER_EVENT * len(labels))
        return {**counts, "xauc": xauc(labels, scores, pairs), "mean_absolute_error_s": error}
    figures = {
        **counts,
        "auc": auc(labels, scores),
        "gauc": gauc(user_ids, labels, scores),
    }
    # A retrieval score is no probability; one that is not a number is no reason to say less.
    if not ((scores < 0.0) | (scores > 1.0)).any():
        figures["log_loss"] = log_loss(labels, scores)
        figures["calibration"] = calibration(labels, scores)
    return figures
