"""Which rows an event sees, in small cases that can be checked by eye."""

from __future__ import annotations

import numpy as np
from sample_events import INT64, make_events, make_rows, replaced, small_config

from marm.events import TASKS, pack_feedback
from marm.memory import RAW_STEP, UserRows
from marm.sequence import (
    NUM_DISTANCE_BUCKETS,
    NUM_GAP_BUCKETS,
    Queries,
    Slab,
    distance_bucket,
    enters_sequence,
    gap_bucket,
    raw_rows,
    view_block,
    view_slab,
)

NAMESPACE = small_config().namespace


def slab_of(*stamps_of_users: list[int], n: int = 10) -> Slab:
    counts = [len(stamps) for stamps in stamps_of_users]
    rows = make_rows(NAMESPACE, [stamp for stamps in stamps_of_users for stamp in stamps])
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Slab.of(UserRows(np.arange(len(counts)), offsets, rows), n)


def queries(*pairs: tuple[int, int]) -> Queries:
    rows, stamps = zip(*pairs, strict=True)
    return Queries(np.array(rows, np.int64), np.array(stamps, np.int64))


def test_a_slab_is_newest_first_and_no_wider_than_needed() -> None:
    slab = slab_of([1, 2, 3], [], [9])
    assert slab.present.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert slab.rows["timestamp_ms"][0].tolist() == [3, 2, 1]
    assert slab_of([1, 2, 3], n=2).rows["timestamp_ms"].tolist() == [[3, 2]]
    assert slab_of([], []).present.tolist() == [[False], [False]]  # one column, for the shapes


def test_raw_rows_are_present_but_not_memorised() -> None:
    rows = make_rows(NAMESPACE, [1, 2, 3])
    rows["written_step"][1] = RAW_STEP
    slab = Slab.of(UserRows(np.array([1]), np.array([0, 3]), rows), 4)
    assert slab.present.tolist() == [[True, True, True]]
    assert slab.memorised.tolist() == [[True, False, True]]


def test_only_the_past_is_visible_and_at_the_same_time_is_not_past() -> None:
    view = view_slab(slab_of([10, 20, 30]), queries((0, 30)), np.zeros(1, np.int64), 10)
    assert view.visible.tolist() == [[False, True, True]]
    # The newest visible row is at distance 1, although it is in the slab's second column.
    assert view.distance[0, 1:].tolist() == distance_bucket(np.array([1, 2])).tolist()


def test_a_slab_beyond_the_query_still_yields_the_newest_n_before_it() -> None:
    slab = slab_of(list(range(0, 100, 10)))
    view = view_slab(slab, queries((0, 55), (0, 1000), (0, 0)), np.zeros(3, np.int64), 3)
    seen = [slab.rows["timestamp_ms"][0][row].tolist() for row in view.visible]
    assert seen == [[50, 40, 30], [90, 80, 70], []]


def test_events_of_the_batch_push_the_oldest_rows_out() -> None:
    slab = slab_of([10, 20, 30])
    view = view_slab(slab, queries((0, 99), (0, 99), (0, 99)), np.array([0, 2, 3]), 3)
    assert view.visible.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert view.distance[1, 0] == distance_bucket(np.array([3]))[0]


def test_events_of_one_moment_do_not_see_each_other() -> None:
    events = make_events(5)
    events = replaced(
        events,
        user_id=np.array([1, 1, 1, 1, 2]),
        timestamp_ms=np.array([10, 20, 20, 30, 15]),
        event_key=np.array([4, 9, 3, 1, 7], np.uint64),
    )
    everyone = np.ones(5, np.bool_)
    user_row = np.array([0, 0, 0, 0, 1])
    view, predecessors = view_block(events, user_row, everyone, 10)
    visible = [np.flatnonzero(row).tolist() for row in view.visible]
    assert visible == [[], [0], [0], [0, 1, 2], []]
    assert predecessors.tolist() == [0, 1, 1, 3, 0]
    # Among simultaneous events the larger key counts as the newer, as in storage.
    expected = distance_bucket(np.array([3, 1, 2])).tolist()
    assert view.distance[3, [0, 1, 2]].tolist() == expected
    # A band of two drops the oldest, a band of one also the smaller key of the tie.
    band = view_block(events, user_row, everyone, 2)[0].visible[3]
    assert np.flatnonzero(band).tolist() == [1, 2]
    band = view_block(events, user_row, everyone, 1)[0].visible[3]
    assert np.flatnonzero(band).tolist() == [1]


def test_events_that_do_not_enter_are_seen_by_nobody_but_see() -> None:
    events = replaced(make_events(3), user_id=np.zeros(3, np.int64))
    entering = np.array([True, False, True])
    view, predecessors = view_block(events, np.zeros(3, np.int64), entering, 10)
    assert [np.flatnonzero(row).tolist() for row in view.visible] == [[], [0], [0]]
    assert predecessors.tolist() == [0, 1, 1]


def test_what_enters_the_sequence() -> None:
    events = make_events(3)
    labels = np.full((3, len(TASKS)), np.nan, np.float32)
    labels[:, TASKS.index("like")] = [1, 0, np.nan]
    events = replaced(events, labels=labels)
    assert enters_sequence(events, "all").tolist() == [True, True, True]
    assert enters_sequence(events, "like").tolist() == [True, False, False]
    assert enters_sequence(events, "click").tolist() == [False, False, False]


def test_distance_buckets() -> None:
    assert distance_bucket(np.array([-5, 0, 1, 2, 4, 8])).tolist() == [0, 0, 0, 4, 8, 12]
    buckets = distance_bucket(np.arange(1, 100_000))
    assert (np.diff(buckets) >= 0).all()
    assert buckets[:8].tolist() == [0, 4, 6, 8, 9, 10, 11, 12]
    assert buckets.max() == NUM_DISTANCE_BUCKETS - 1
    assert distance_bucket(np.array([INT64.max])).tolist() == [NUM_DISTANCE_BUCKETS - 1]


def test_gap_buckets() -> None:
    gaps_s = np.array([0, 0.999, 1, 2.999, 3, 7, 3600, 86_400, 10**12])
    assert gap_bucket((gaps_s * 1000).astype(np.int64)).tolist() == [
        0, 0, 1, 1, 2, 3, 11, 16, NUM_GAP_BUCKETS - 1,
    ]  # fmt: skip
    assert gap_bucket(np.array([INT64.min, -1])).tolist() == [0, 0]
    assert gap_bucket(np.array([INT64.max])).tolist() == [NUM_GAP_BUCKETS - 1]


def test_events_as_raw_rows() -> None:
    events = make_events(7)
    rows = raw_rows(events, NAMESPACE.row_dtype)
    for name in ("event_key", "item_id", "timestamp_ms", "author_id", "tag_id", "context_id"):
        np.testing.assert_array_equal(rows[name], getattr(events, name))
    np.testing.assert_array_equal(rows["feedback"], pack_feedback(events.labels))
    assert (rows["written_step"] == RAW_STEP).all()
    assert not rows["memory"].any()
