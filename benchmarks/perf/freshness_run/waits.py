"""How long feedback takes to arrive: in memory, computed, and in the models that answer.

Shape legend: P posts. Moments are of the monotonic clock, in seconds; a wait of NaN never ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.perf.figures import Figure, exactly
from benchmarks.perf.timing import Ratio
from cache_actors.event_log.offsets import LogOffsets
from stages.request import StageName

Waits = NDArray[np.float64]
"""Seconds from sending each post, ``[P]``."""

ModelVersion = tuple[StageName, int]


@dataclass(frozen=True)
class Post:
    """One feedback event, and when its request was sent and its receipt read."""

    user_id: int
    event_key: int
    sent_s: float
    confirmed_s: float


@dataclass
class RowSeen:
    """When a request could first read the row of an event, and first read it as computed."""

    visible_s: float = np.nan
    computed_s: float = np.nan


@dataclass(frozen=True)
class Answer:
    """When an answer was read, and the models that it was made by."""

    ended_s: float
    versions: tuple[ModelVersion, ...]


@dataclass(frozen=True)
class LogPlace:
    """Where an event lies in the log: offsets of its bucket right after it."""

    bucket: int
    segment: int
    rows: int


def has_learned(learned: LogOffsets, place: LogPlace) -> bool:
    """Whether a model that has learned all before ``learned`` has learned the event."""
    segment, rows = learned.positions[place.bucket].tolist()
    return (segment, rows) >= (place.segment, place.rows)


def covers(learned: LogOffsets, end: LogOffsets) -> bool:
    """Whether ``learned`` is at or after ``end`` in every bucket."""
    segment, rows = learned.positions.T
    end_segment, end_rows = end.positions.T
    return bool(((segment > end_segment) | ((segment == end_segment) & (rows >= end_rows))).all())


def waits_for_rows(
    posts: Sequence[Post], seen: Mapping[int, RowSeen]
) -> tuple[Waits, Waits, Waits]:
    """Waits for the receipt, for the row, and for the computed row; ``seen`` is by event key."""
    sent_s = np.array([post.sent_s for post in posts], np.float64)
    rows = [seen.get(post.event_key, RowSeen()) for post in posts]
    confirmed_s = np.array([post.confirmed_s for post in posts], np.float64)
    visible_s = np.array([row.visible_s for row in rows], np.float64)
    computed_s = np.array([row.computed_s for row in rows], np.float64)
    return confirmed_s - sent_s, visible_s - sent_s, computed_s - sent_s


def waits_for_models(
    posts: Sequence[Post],
    places: Mapping[int, LogPlace],
    answers: Iterable[Answer],
    learned: Mapping[ModelVersion, LogOffsets],
    stages: Sequence[StageName],
) -> Waits:
    """Waits for the first answer whose models of all ``stages`` have learned the post.

    Args:
        posts: what was sent.
        places: where each event lies, by event key.
        answers: in any order.
        learned: what each version has learned. A version that is not in it has learned nothing.
        stages: an answer that one of them has no part in counts for nothing.
    """
    first_s: dict[tuple[LogOffsets, ...], float] = {}
    for answer in answers:
        made_by = {stage: learned.get((stage, version)) for stage, version in answer.versions}
        known = tuple(found for stage in stages if (found := made_by.get(stage)) is not None)
        if len(known) == len(stages):
            first_s[known] = min(first_s.get(known, np.inf), answer.ended_s)
    waits = np.full(len(posts), np.nan)
    for index, post in enumerate(posts):
        # What was learned stays learned, so the first answer of each set of versions is enough.
        ended = [
            ended_s
            for known, ended_s in first_s.items()
            if all(has_learned(offsets, places[post.event_key]) for offsets in known)
        ]
        if ended:
            waits[index] = min(ended) - post.sent_s
    return waits


def wait_figures(key: str, what: str, waits: Waits) -> tuple[Figure, ...]:
    """Median with quartiles under ``key_s``, then the 90th percentile and the longest.

    Raises:
        ValueError: no wait ended.
    """
    ended = waits[np.isfinite(waits)]
    if not len(ended):
        raise ValueError(f"none of {len(waits)} posts arrived: {what}; was the follower running?")
    lower, median, upper, p90 = np.quantile(ended, [0.25, 0.5, 0.75, 0.9]).tolist()
    return (
        Figure(f"{key}_s", f"{what}, seconds: median", Ratio(median, lower, upper)),
        Figure(f"{key}_p90_s", "90th percentile", exactly(p90)),
        Figure(f"{key}_max_s", "longest", exactly(float(ended.max()))),
    )
