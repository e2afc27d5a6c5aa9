"""Events that can't be right: skipped or kept by rule, and counted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sample_events import make_events

from marm.events import TASKS, WATCH_TIME, EventBatch
from train.screening import (
    BEFORE_1970,
    FUTURE,
    LABELS,
    LATE,
    MAX_WATCH_S,
    EventScreen,
    impossible_labels,
)

NOW_MS = 1_700_000_000_000
DAY_MS = 86_400_000


def events_at(stamps: list[int]) -> EventBatch:
    return replace(make_events(len(stamps)), timestamp_ms=np.array(stamps, np.int64))


def screen(**settings: float | None) -> EventScreen:
    return EventScreen(clock_ms=lambda: NOW_MS, **settings)  # type: ignore[arg-type]


def test_sound_events_pass_untouched() -> None:
    events, tested = events_at([NOW_MS - 2, NOW_MS - 1, NOW_MS]), screen()
    assert tested.pass_on(events) is events
    assert set(tested.tallies.values()) == {0}


def test_events_from_the_future_are_skipped() -> None:
    tested = screen()
    stamps = [NOW_MS, NOW_MS + DAY_MS, NOW_MS + DAY_MS + 1, np.iinfo(np.int64).max]
    assert tested.pass_on(events_at(stamps)).timestamp_ms.tolist() == stamps[:2]
    assert tested.tallies[FUTURE] == 2


def test_a_simulated_future_can_be_kept() -> None:
    tested = screen(max_ahead_s=None)
    stamps = [NOW_MS, NOW_MS + 400 * DAY_MS]
    assert tested.pass_on(events_at(stamps)).timestamp_ms.tolist() == stamps
    assert tested.tallies[FUTURE] == 0


def test_times_before_1970_are_skipped() -> None:
    tested = screen()
    stamps = [np.iinfo(np.int64).min, -1, 0, 5]
    assert tested.pass_on(events_at(stamps)).timestamp_ms.tolist() == [0, 5]
    assert tested.tallies[BEFORE_1970] == 2


def test_events_far_older_than_the_newest_are_kept_and_counted() -> None:
    tested = screen()
    first = [NOW_MS - 3 * DAY_MS, NOW_MS, NOW_MS - DAY_MS]  # the last is behind by just the limit
    assert len(tested.pass_on(events_at(first))) == 3
    assert tested.tallies[LATE] == 0
    assert len(tested.pass_on(events_at([NOW_MS - DAY_MS - 1, 7]))) == 2
    assert tested.tallies[LATE] == 2


def test_an_event_that_is_skipped_makes_no_other_late() -> None:
    tested = screen()
    tested.pass_on(events_at([1 << 62, NOW_MS]))
    assert tested.newest_ms == NOW_MS
    assert tested.tallies[LATE] == 0


@pytest.mark.parametrize("value", [-0.5, 1.5, 7.0, np.inf, -np.inf])
def test_impossible_binary_labels(value: float) -> None:
    labels = np.zeros((1, len(TASKS)), np.float32)
    labels[0, 2] = value
    assert np.argwhere(impossible_labels(labels)).tolist() == [[0, 2]]


@pytest.mark.parametrize("value", [-1.0, np.inf, 2 * MAX_WATCH_S])
def test_impossible_watch_times(value: float) -> None:
    labels = np.zeros((1, len(TASKS)), np.float32)
    labels[0, TASKS.index(WATCH_TIME)] = value
    assert np.argwhere(impossible_labels(labels)).tolist() == [[0, TASKS.index(WATCH_TIME)]]


def test_what_was_not_observed_is_not_impossible() -> None:
    labels = np.full((2, len(TASKS)), np.nan, np.float32)
    labels[1] = [0, 1, 0.5, 1, 0, 1, 3600.0]
    assert not impossible_labels(labels).any()


def test_impossible_labels_become_unknown_and_others_stay() -> None:
    events, tested = events_at([1, 2]), screen()
    events.labels[:] = 1.0
    events.labels[1, 0], events.labels[1, -1] = 3.0, np.inf
    passed = tested.pass_on(events)
    assert np.argwhere(np.isnan(passed.labels)).tolist() == [[1, 0], [1, len(TASKS) - 1]]
    assert tested.tallies[LABELS] == 2
    assert (passed.labels[0] == 1.0).all()
