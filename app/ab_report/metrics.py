"""What is compared: ratios of sums per user, and guards that must not get worse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from app.ab_report.answers import Answers
from app.ab_report.attribution import Attributed
from marm.events import TASKS, WATCH_TIME

Per = Literal["item", "request", "user"]


@dataclass(frozen=True)
class Metric:
    """A ratio: a signal, summed over all answers of a user, per item, per request or per user."""

    name: str
    what: str
    signal: str
    per: Per
    guard: bool = False

    @property
    def task(self) -> str | None:
        """The task of the event log behind it, when there is one."""
        return self.signal if self.signal in TASKS else None


@dataclass(frozen=True)
class QuantileMetric:
    """A quantile of a request's signal; always a guard."""

    name: str
    what: str
    signal: str
    share: float


METRICS: tuple[Metric, ...] = (
    Metric("long_view_rate", "long views per item shown", "long_view", "item"),
    Metric("watch_time_per_item_s", "seconds watched per item shown", WATCH_TIME, "item"),
    Metric("watch_time_per_user_s", "seconds watched per user", WATCH_TIME, "user"),
    Metric("click_rate", "clicks per item shown", "click", "item"),
    Metric("like_rate", "likes per item shown", "like", "item"),
    Metric("comment_rate", "comments per item shown", "comment", "item"),
    Metric("forward_rate", "forwards per item shown", "forward", "item"),
    Metric("follow_rate", "follows per item shown", "follow", "item"),
    Metric("feedback_rate", "items with any feedback per item shown", "feedback", "item"),
    Metric("requests_per_user", "answered requests per user", "request", "user"),
)
"""Metrics to improve, the one that people look at first on top."""

GUARDS: tuple[Metric, ...] = (
    Metric("latency_mean_ms", "mean latency of a request", "latency_ms", "request", guard=True),
    Metric("degraded_share", "requests answered degraded", "degraded", "request", guard=True),
)
LATENCY_P99 = QuantileMetric("latency_p99_ms", "99th percentile of the latency", "latency_ms", 0.99)


@dataclass(frozen=True)
class RequestSums:
    """Signals of ``N`` answers, each ``[N]``, and how many items they showed."""

    signals: dict[str, NDArray[np.float64]]
    items: NDArray[np.float64]  # [N]

    def denominator(self, per: Per) -> NDArray[np.float64]:
        """How much each answer adds to the denominator; per user is for the caller to count."""
        return self.items if per == "item" else np.ones(len(self.items))


def request_sums(answers: Answers, attributed: Attributed) -> RequestSums:
    """Sum what came back to the items of each answer."""
    count, request = len(answers), answers.request[attributed.item]
    signals = {
        task: sum_by(request, attributed.labels[:, index], count)
        for index, task in enumerate(TASKS)
    }
    signals["feedback"] = sum_by(request, np.ones(len(request)), count)
    signals["request"] = np.ones(count)
    signals["latency_ms"] = answers.latency_ms
    signals["degraded"] = answers.degraded.astype(np.float64)
    return RequestSums(signals, answers.items_shown.astype(np.float64))


def sum_by(
    place: NDArray[np.int64], values: NDArray[np.float64], count: int
) -> NDArray[np.float64]:
    """Sum of the ``values`` at each place 0 .. ``count`` - 1, ``[count]``."""
    return np.bincount(place, values, minlength=count).astype(np.float64)


def choose_metrics(names: Sequence[str] | None, task_observed: NDArray[np.bool_]) -> list[Metric]:
    """The metrics called ``names``; by default all whose task the feedback reports at all."""
    observed = {task for task, seen in zip(TASKS, task_observed, strict=True) if seen}
    if names is None:
        return [m for m in METRICS if m.task is None or m.task in observed]
    by_name = {metric.name: metric for metric in METRICS}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(f"metrics must be some of {', '.join(by_name)}; got {', '.join(unknown)}")
    chosen = [by_name[name] for name in names]
    unseen = [m.name for m in chosen if m.task is not None and m.task not in observed]
    if unseen:
        raise ValueError(
            f"no feedback of these exposures reports what {', '.join(unseen)} counts; choose other "
            "metrics"
        )
    return chosen
