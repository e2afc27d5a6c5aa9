"""Small exposure and event logs for tests of A/B reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from cache_actors.event_log.log import EventLog
from cache_actors.exposure_log.schema import Exposure, StageExposure, exposures_to_table
from cache_actors.exposure_log.segments import write_segment
from cache_actors.home import Home
from marm.addressing import event_key
from marm.events import TASKS, EventBatch

START_MS = 1_767_225_600_000
"""2026-01-01, UTC."""
MINUTE_MS = 60_000
EXPERIMENT = "depth"

Feedback = tuple[int, int, int, Mapping[str, float]]
"""User, item, time in ms, labels by task."""


def make_feedback(reports: Iterable[Feedback]) -> EventBatch:
    """Events of ``reports``; tasks that are not named were not observed."""
    given = list(reports)
    labels = np.full((len(given), len(TASKS)), np.nan, np.float32)
    for row, (_, _, _, values) in enumerate(given):
        for task, value in values.items():
            labels[row, TASKS.index(task)] = value
    user_id, item_id, time_ms = (
        np.array([report[column] for report in given], np.int64) for column in range(3)
    )
    zeros = np.zeros(len(given), np.int64)
    return EventBatch(
        user_id=user_id,
        item_id=item_id,
        timestamp_ms=time_ms,
        event_key=event_key(user_id, item_id, time_ms),
        author_id=zeros,
        tag_id=zeros,
        duration_ms=zeros,
        context_id=zeros.astype(np.int32),
        labels=labels,
    )


def make_exposure(
    user_id: int,
    time_ms: int,
    items: Iterable[int],
    arm: str = "control",
    *,
    experiment: str = EXPERIMENT,
    shadow: bool = False,
    overridden: bool = False,
    holdout: bool = False,
    latency_ms: float = 20.0,
    degraded: tuple[str, ...] = (),
) -> Exposure:
    """An answer with ``arm`` at ranking."""
    shown = np.array(list(items), np.int64)
    return Exposure(
        request_id=f"{user_id}-{time_ms}",
        time_ms=time_ms,
        user_id=user_id,
        item_ids=shown,
        scores=np.zeros(len(shown), np.float32),
        latency_ms=latency_ms,
        degraded=degraded,
        holdout=holdout,
        overridden=overridden,
        stages={"ranking": StageExposure(experiment, arm, 1, 2, shadow)},
    )


def write_logs(path: object, exposures: Iterable[Exposure], feedback: Iterable[Feedback]) -> Home:
    """A home with these logs."""
    home = Home(path).create()  # type: ignore[arg-type]
    given = list(exposures)
    if given:
        write_segment(home.exposures, exposures_to_table(given))
    EventLog(home.log).append(make_feedback(feedback))
    return home


def two_arms(
    users: int = 200, lift: float = 0.3, seed: int = 0, history: bool = True
) -> tuple[list[Exposure], list[Feedback]]:
    """Users on two arms, alternating; the second arm gets more long views. With ``history``, what
    each user likes shows before the experiment, too."""
    rng = np.random.default_rng(seed)
    exposures, feedback = [], []
    for user in range(1, users + 1):
        taste = rng.beta(4, 8)
        arm = "deep" if user % 2 else "control"
        if history:
            for item in range(20):
                time_ms = START_MS - (item + 1) * 60 * MINUTE_MS
                feedback.append((user, 500 + item, time_ms, {"long_view": rng.random() < taste}))
        for request in range(1 + rng.poisson(3)):
            time_ms = START_MS + request * 30 * MINUTE_MS + user
            items = [100 * request + place for place in range(5)]
            slow = 1.2 if arm == "deep" else 1.0
            exposures.append(
                make_exposure(user, time_ms, items, arm, latency_ms=slow * rng.gamma(40, 0.5))
            )
            chance = taste * (1 + lift * (arm == "deep"))
            for place, item in enumerate(items):
                labels = {"long_view": float(rng.random() < chance), "watch_time": rng.gamma(2, 5)}
                feedback.append((user, item, time_ms + (place + 1) * MINUTE_MS, labels))
    return exposures, feedback
