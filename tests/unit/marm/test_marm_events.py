"""Feedback in 32 bits: what was observed survives, what was not stays unknown."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sample_events import make_events

from marm.events import (
    BINARY_TASKS,
    EVENT_DTYPES,
    TASKS,
    EventBatch,
    merge_feedback,
    pack_feedback,
)

KNOWN = 1 << 6


def labels_of(**observed: float) -> NDArray[np.float32]:
    row = np.full((1, len(TASKS)), np.nan, np.float32)
    for task, value in observed.items():
        row[0, TASKS.index(task)] = value
    return row


def packed(**observed: float) -> int:
    return int(pack_feedback(labels_of(**observed))[0])


@pytest.mark.parametrize("bit", range(len(BINARY_TASKS)))
def test_every_signal_has_its_bit(bit: int) -> None:
    assert packed(**{BINARY_TASKS[bit]: 1.0}) == (1 << bit) | KNOWN


def test_unknown_is_not_negative() -> None:
    assert packed() == 0
    assert packed(click=0.0) == KNOWN
    assert packed(like=float("nan")) == 0
    assert packed(click=0.0, watch_time=0.0) == KNOWN | (1 << 8)


@pytest.mark.parametrize(
    ("watch_s", "bucket"),
    [
        (-5.0, 1),
        (0.0, 1),
        (0.9, 1),
        (1.0, 2),
        (2.9, 2),
        (3.0, 3),
        (62.9, 6),
        (63.0, 7),
        (16_382.0, 14),
        (16_383.0, 15),
        (1e9, 15),
        (float("inf"), 15),
    ],
)
def test_watch_time_is_kept_by_octave_with_a_cap(watch_s: float, bucket: int) -> None:
    assert packed(watch_time=watch_s) >> 8 == bucket


def test_nothing_else_is_set() -> None:
    everything = packed(**dict.fromkeys(BINARY_TASKS, 1.0), watch_time=1e30)
    assert everything == 0b1111_0111_1111


def test_no_events_no_feedback() -> None:
    assert pack_feedback(np.empty((0, len(TASKS)), np.float32)).shape == (0,)


def merged(old: int, new: int) -> int:
    return int(merge_feedback(np.array([old], np.uint32), np.array([new], np.uint32))[0])


def test_a_second_report_adds_signals_and_keeps_the_longer_watch() -> None:
    click, like = packed(click=1.0, watch_time=63.0), packed(like=1.0, watch_time=3.0)
    both = packed(click=1.0, like=1.0, watch_time=63.0)
    assert merged(click, like) == merged(like, click) == both
    assert merged(0, click) == merged(click, 0) == click
    assert merged(click, click) == click
    # An explicit negative later does not take back a positive.
    assert merged(click, packed(click=0.0)) == click
    assert merged(0, 0) == 0


def test_merge_is_associative_and_idempotent_on_all_values() -> None:
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(0, 1 << 12, 5000).astype(np.uint32) for _ in range(3))
    left = merge_feedback(merge_feedback(a, b), c)
    np.testing.assert_array_equal(left, merge_feedback(a, merge_feedback(b, c)))
    np.testing.assert_array_equal(left, merge_feedback(left, b))
    np.testing.assert_array_equal(merge_feedback(a, b), merge_feedback(b, a))


def test_take_and_concat() -> None:
    events = make_events(10)
    parts = [events.take(slice(0, 3)), EventBatch.empty(), events.take(np.arange(3, 10))]
    joined = EventBatch.concat(parts)
    assert len(joined) == 10
    for name in (*EVENT_DTYPES, "labels"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(events, name))
        assert getattr(joined, name).dtype == getattr(events, name).dtype
    wanted = events.timestamp_ms > events.timestamp_ms[4]
    assert events.take(wanted).timestamp_ms.tolist() == events.timestamp_ms[5:].tolist()


def test_empty_batches_have_the_types_of_events() -> None:
    for empty in (EventBatch.empty(), EventBatch.concat([])):
        assert len(empty) == 0
        assert {name: getattr(empty, name).dtype for name in EVENT_DTYPES} == {
            name: np.dtype(kind) for name, kind in EVENT_DTYPES.items()
        }
        assert empty.labels.shape == (0, len(TASKS))
