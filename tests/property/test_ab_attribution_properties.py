"""The sorted join against one that looks at every pair."""

from __future__ import annotations

import numpy as np
from ab_logs import make_exposure, make_feedback
from hypothesis import given, settings
from hypothesis import strategies as st

from app.ab_report.answers import Answers, parse_answers
from app.ab_report.attribution import attribute
from cache_actors.exposure_log.schema import exposures_to_table
from marm.events import TASKS, EventBatch

WINDOW_MS = 6
IDS, TIMES = st.integers(1, 3), st.integers(0, 20)
EXPOSURES = st.lists(st.tuples(IDS, TIMES, st.lists(IDS, max_size=3, unique=True)), max_size=8)
LABELS = st.dictionaries(st.sampled_from(TASKS), st.integers(0, 3).map(float), max_size=3)
FEEDBACK = st.lists(st.tuples(IDS, IDS, TIMES, LABELS), max_size=12)


def attributed_slowly(answers: Answers, events: EventBatch) -> tuple[np.ndarray, int]:
    """Labels of every shown item and the number of events, by the definition."""
    by_event: dict[tuple[int, int], list[int]] = {}
    for row in range(len(events)):
        by_event.setdefault((int(events.user_id[row]), int(events.event_key[row])), []).append(row)
    labels = np.zeros((len(answers.item_id), len(TASKS)))
    attributed = 0
    for rows in by_event.values():
        time_ms = events.timestamp_ms[rows[0]]
        shown = [
            (answers.time_ms[answers.request[place]], place)
            for place in range(len(answers.item_id))
            if answers.item_id[place] == events.item_id[rows[0]]
            and answers.user_id[answers.request[place]] == events.user_id[rows[0]]
            and time_ms - answers.time_ms[answers.request[place]] >= 0
        ]
        if not shown or time_ms - max(shown)[0] > WINDOW_MS:
            continue
        attributed += 1
        merged = np.nan_to_num(events.labels[rows]).max(axis=0)
        place = max(shown)[1]
        watch = TASKS.index("watch_time")
        total = labels[place, watch] + merged[watch]
        labels[place] = np.maximum(labels[place], merged)
        labels[place, watch] = total
    return labels, attributed


@given(EXPOSURES, FEEDBACK)
@settings(max_examples=100, deadline=None)
def test_join_agrees_with_looking_at_every_pair(
    exposures: list[tuple[int, int, list[int]]],
    feedback: list[tuple[int, int, int, dict[str, float]]],
) -> None:
    rows = [make_exposure(user, time_ms, items) for user, time_ms, items in exposures]
    answers, events = parse_answers(exposures_to_table(rows)), make_feedback(feedback)
    labels, attributed = attributed_slowly(answers, events)
    found = attribute(answers, events, WINDOW_MS)
    dense = np.zeros_like(labels)
    dense[found.item] = found.labels
    np.testing.assert_allclose(dense, labels)
    assert found.attributed_events == attributed
