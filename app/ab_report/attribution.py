"""Which exposure a piece of feedback belongs to: the latest one of that user and item."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.ab_report.answers import Answers
from marm.events import TASKS, WATCH_TIME, EventBatch

_WATCH = TASKS.index(WATCH_TIME)


@dataclass(frozen=True)
class Attributed:
    """What came back to the shown items: ``F`` of them got any feedback."""

    item: NDArray[np.int64]  # [F], places among the shown items, ascending
    labels: NDArray[np.float64]  # [F, len(TASKS)]; 0 where not observed
    task_observed: NDArray[np.bool_]  # [len(TASKS)], whether any event reported the task
    attributed_events: int
    other_events: int  # of these users and times, but after no exposure within the window


def attribute(answers: Answers, events: EventBatch, window_ms: int) -> Attributed:
    """Give each event to the latest exposure of its user and item that is at most ``window_ms``
    older, and not younger.

    Several reports of one event (equal ``event_key``) are one event: signals add up and the longer
    watch wins. Several events of one exposure are watches of their own, whose times add up; each
    of the other signals counts once. What was not observed counts as not having happened.
    """
    if window_ms < 1:
        raise ValueError(f"the attribution window must be at least 1 ms, got {window_ms}")
    shown_at = answers.time_ms[answers.request]
    place = _latest_exposure(answers, shown_at, events)
    found = place >= 0
    found[found] = events.timestamp_ms[found] - shown_at[place[found]] <= window_ms
    kept = events.take(found)
    labels, first = _merged_reports(kept)
    item, labels = _per_item(place[found][first], labels)
    return Attributed(
        item=item,
        labels=labels,
        task_observed=np.asarray((~np.isnan(kept.labels)).any(axis=0)),
        attributed_events=len(first),
        other_events=int((~found).sum()),
    )


def _latest_exposure(
    answers: Answers, shown_at: NDArray[np.int64], events: EventBatch
) -> NDArray[np.int64]:
    """The place of the latest exposure at or before each event, or -1, ``[B]``."""
    exposures = len(answers.item_id)
    # One sort of exposures and events together, exposures first at equal times: the last exposure
    # above an event is the one wanted, if it is of the same user and item.
    user = np.concatenate([answers.user_id[answers.request], events.user_id])
    item = np.concatenate([answers.item_id, events.item_id])
    time = np.concatenate([shown_at, events.timestamp_ms])
    is_event = np.arange(len(user)) >= exposures
    order = np.lexsort((is_event, time, item, user))
    latest = np.maximum.accumulate(np.where(is_event[order], -1, np.arange(len(order))))
    place = np.full(len(user), -1, np.int64)
    known = latest >= 0
    candidate = order[latest[known]]
    mine = order[known]
    same = (user[candidate] == user[mine]) & (item[candidate] == item[mine])
    place[mine[same]] = candidate[same]
    return place[exposures:]


def _merged_reports(
    events: EventBatch,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Labels of distinct events without NaN, ``[E, len(TASKS)]``, and where each first stands."""
    order = np.lexsort((events.event_key, events.user_id))
    user, key = events.user_id[order], events.event_key[order]
    is_first = np.ones(len(order), np.bool_)
    is_first[1:] = (user[1:] != user[:-1]) | (key[1:] != key[:-1])
    labels = np.nan_to_num(events.labels[order].astype(np.float64))
    starts = np.flatnonzero(is_first)
    merged = np.maximum.reduceat(labels, starts, axis=0) if len(starts) else labels
    return merged, order[starts]


def _per_item(
    item: NDArray[np.int64], labels: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Distinct items with the labels of all their events."""
    if not len(item):
        return item, labels
    order = np.argsort(item, kind="stable")
    distinct, starts = np.unique(item[order], return_index=True)
    joined = np.maximum.reduceat(labels[order], starts, axis=0)
    joined[:, _WATCH] = np.add.reduceat(labels[order, _WATCH], starts)
    return distinct, joined
