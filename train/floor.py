"""The floor every model must stay above: a running, smoothed mean of each item's labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from marm.events import TASKS
from marm.item_stats import PRIOR_STRENGTH
from marm.metrics import auc, gauc

_READ_EVENTS = 1 << 16


def item_mean_floor(log: EventLog, task: str, evaluate_from_ms: int) -> dict[str, float]:
    """AUC and GAUC of predicting every event by its item's mean label so far (test-then-train).

    Uses events with an observed label of ``task``; evaluates those from ``evaluate_from_ms`` on.
    """
    column = TASKS.index(task)
    parts = [
        (batch.user_id, batch.item_id, batch.timestamp_ms, batch.labels[:, column])
        for batch in log.read(LogOffsets.start(), max_events=_READ_EVENTS)
    ]
    if not parts:
        return {"auc": float("nan"), "gauc": float("nan")}
    users, items, stamps, labels = (np.concatenate(list(part)) for part in zip(*parts, strict=True))
    observed = ~np.isnan(labels)
    users, items, stamps, labels = (a[observed] for a in (users, items, stamps, labels))
    scores = running_item_mean(items, labels)
    kept = stamps >= evaluate_from_ms
    return {
        "auc": auc(labels[kept], scores[kept]),
        "gauc": gauc(users[kept], labels[kept], scores[kept]),
    }


def running_item_mean(items: NDArray[np.int64], labels: NDArray) -> NDArray[np.float64]:
    """Smoothed mean label of each event's item over the events before it, in order."""
    labels = labels.astype(np.float64)
    order = np.argsort(items, kind="stable")
    sorted_items, sorted_labels = items[order], labels[order]
    starts = np.flatnonzero(np.append(True, sorted_items[1:] != sorted_items[:-1]))
    first = np.repeat(starts, np.diff(np.append(starts, len(items))))
    position = np.arange(len(items))
    before = np.concatenate([[0.0], np.cumsum(sorted_labels)])
    sums, counts = before[position] - before[first], position - first
    prior = (np.concatenate([[0.0], np.cumsum(labels)[:-1]]) + 1.0) / (position + 2.0)
    scores = np.empty(len(items))
    scores[order] = (sums + PRIOR_STRENGTH * prior[order]) / (counts + PRIOR_STRENGTH)
    return scores
