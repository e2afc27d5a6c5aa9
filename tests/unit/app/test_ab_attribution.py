"""Which exposure feedback belongs to."""

from __future__ import annotations

import numpy as np
import pytest
from ab_logs import Feedback, make_exposure, make_feedback
from numpy.typing import NDArray

from app.ab_report.answers import Answers, parse_answers
from app.ab_report.attribution import Attributed, attribute
from cache_actors.exposure_log.schema import Exposure, exposures_to_table
from marm.events import TASKS, EventBatch

WINDOW_MS = 1_000
LONG_VIEW, LIKE, WATCH = (TASKS.index(task) for task in ("long_view", "like", "watch_time"))


def answers_of(*exposures: Exposure) -> Answers:
    return parse_answers(exposures_to_table(exposures))


def feedback_of(*reports: Feedback) -> EventBatch:
    return make_feedback(reports)


def dense(found: Attributed, answers: Answers) -> NDArray[np.float64]:
    """Labels of every shown item."""
    labels = np.zeros((len(answers.item_id), len(TASKS)))
    labels[found.item] = found.labels
    return labels


def test_feedback_belongs_to_the_latest_exposure_of_user_and_item() -> None:
    answers = answers_of(
        make_exposure(1, 100, [7, 8]), make_exposure(1, 200, [8, 7]), make_exposure(2, 300, [7])
    )
    found = attribute(
        answers, feedback_of((1, 7, 150, {"like": 1}), (1, 7, 250, {"like": 1})), WINDOW_MS
    )
    np.testing.assert_array_equal(answers.item_id, [7, 8, 8, 7, 7])
    np.testing.assert_array_equal(dense(found, answers)[:, LIKE], [1, 0, 0, 1, 0])
    np.testing.assert_array_equal(found.item, [0, 3])
    assert (found.attributed_events, found.other_events) == (2, 0)


def test_window_includes_both_ends_and_nothing_earlier() -> None:
    answers = answers_of(*(make_exposure(user, 1_000, [7]) for user in (1, 2, 3, 4)))
    events = feedback_of(
        (1, 7, 999, {"like": 1}),
        (2, 7, 1_000, {"like": 1}),
        (3, 7, 2_000, {"like": 1}),
        (4, 7, 2_001, {"like": 1}),
    )
    found = attribute(answers, events, WINDOW_MS)
    np.testing.assert_array_equal(dense(found, answers)[:, LIKE], [0, 1, 1, 0])
    assert found.other_events == 2


def test_other_users_and_items_are_not_credited() -> None:
    answers = answers_of(make_exposure(1, 100, [7]))
    events = feedback_of((2, 7, 150, {"like": 1}), (1, 8, 150, {"like": 1}))
    found = attribute(answers, events, WINDOW_MS)
    assert found.attributed_events == 0
    assert not dense(found, answers).any()
    assert not found.task_observed.any()


def test_signals_count_once_and_watches_add_up() -> None:
    answers = answers_of(make_exposure(1, 100, [7]))
    events = feedback_of(
        (1, 7, 150, {"long_view": 1, "watch_time": 20}),
        (1, 7, 160, {"long_view": 1, "watch_time": 5}),
    )
    found = attribute(answers, events, WINDOW_MS)
    assert dense(found, answers)[0, LONG_VIEW] == 1
    assert dense(found, answers)[0, WATCH] == 25


def test_reports_of_one_event_are_one_event() -> None:
    answers = answers_of(make_exposure(1, 100, [7]))
    events = feedback_of(
        (1, 7, 150, {"long_view": 0, "watch_time": 5}), (1, 7, 150, {"like": 1, "watch_time": 20})
    )
    found = attribute(answers, events, WINDOW_MS)
    assert found.attributed_events == 1
    assert dense(found, answers)[0, LIKE] == 1
    assert dense(found, answers)[0, WATCH] == 20
    np.testing.assert_array_equal(
        [found.task_observed[task] for task in (LONG_VIEW, LIKE, WATCH, TASKS.index("click"))],
        [True, True, True, False],
    )


def test_shadow_runs_are_no_exposures() -> None:
    answers = answers_of(
        make_exposure(1, 100, [7]), make_exposure(1, 110, [7], "deep", shadow=True)
    )
    assert len(answers) == 1
    found = attribute(answers, feedback_of((1, 7, 150, {"like": 1})), WINDOW_MS)
    np.testing.assert_array_equal(found.item, [0])


def test_answers_without_items_are_answers() -> None:
    answers = answers_of(make_exposure(1, 100, []), make_exposure(1, 200, [7, 8]))
    np.testing.assert_array_equal(answers.items_shown, [0, 2])
    assert not answers_of().items_shown.size


def test_window_must_be_positive() -> None:
    with pytest.raises(ValueError, match="window"):
        attribute(answers_of(), make_feedback([]), 0)
