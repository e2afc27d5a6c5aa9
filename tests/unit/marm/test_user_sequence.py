"""How a batch is laid out as one sequence per user, in small cases that can be checked by eye."""

from __future__ import annotations

import numpy as np
import pytest
from deep_histories import EMPTY_USER, LATE_USER, deep_events
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_events import (
    NOW_MS,
    fetch_for,
    make_events,
    make_items,
    replaced,
    rows_of_user,
    small_config,
)

from marm.config import InterestConfig, ModelConfig
from marm.events import EventBatch
from marm.inputs import InputBuilder, ModelInputs
from marm.interest.user_sequence import NOWHERE, Places, UserSequence
from marm.memory import InProcessMemory, Namespace, UserRows
from marm.sequence import raw_rows
from marm.sparse import HashedTable


def builder(n: int, **interest: object) -> InputBuilder:
    config: ModelConfig = small_config(
        namespace=Namespace(depth=0, dim=8, dtype="float32"),
        history_length=n,
        interests=(InterestConfig(**{"method": "decoder", **interest}),),  # type: ignore[arg-type]
    )
    return InputBuilder(config, HashedTable(512, 6))


def events_at(stamps: list[int], users: list[int] | None = None) -> EventBatch:
    """Events with keys in the order given."""
    num = len(stamps)
    return replaced(
        make_events(num),
        timestamp_ms=np.array(stamps),
        user_id=np.zeros(num, np.int64) if users is None else np.array(users),
        event_key=np.arange(1, num + 1).astype(np.uint64),
    )


def stored(*users: list[int]) -> UserRows:
    """Rows of users 0, 1, ... at these times."""
    stamps = [stamp for user in users for stamp in user]
    rows = raw_rows(events_at(stamps), Namespace(depth=0, dim=8, dtype="float32").row_dtype)
    offsets = np.concatenate([[0], np.cumsum([len(user) for user in users])]).astype(np.int64)
    return UserRows(np.arange(len(users)), offsets, rows)


def sequence_of(inputs: ModelInputs) -> UserSequence:
    assert inputs.sequence is not None
    return inputs.sequence


def runs(places: Places) -> list[list[tuple[int, int]]]:
    """What each token sees, (first, end), user by user."""
    return [
        [
            (int(places.first_VT[v, t]), int(places.end_VT[v, t]))
            for t in range(int(places.length_V[v]))
        ]
        for v in range(places.shape[0])
    ]


def test_stored_rows_and_events_are_one_sequence_oldest_first() -> None:
    sequence = sequence_of(builder(10).for_training(events_at([30, 40, 50]), stored([10, 20])))
    # The newest event is seen by none.
    assert sequence.rows.timestamp_ms_VT.tolist() == [[10, 20, 30, 40]]
    assert sequence.ordinal_UR.tolist() == [[-2, -1, 0, 1]]
    assert sequence.slab_source.tolist() == [1, 0]  # the slab is newest first
    assert sequence.block_source.tolist() == [0, 1]
    assert runs(sequence.rows) == [[(0, 0), (0, 1), (0, 2), (0, 3)]]
    assert runs(sequence.queries) == [[(0, 2), (0, 3), (0, 4)]]
    assert sequence.num_rows == 4


def test_nobody_sees_more_than_n_rows() -> None:
    sequence = sequence_of(builder(2).for_training(events_at([30, 40, 50]), stored([10, 20])))
    assert runs(sequence.rows) == [[(0, 0), (0, 1), (0, 2), (1, 3)]]
    assert runs(sequence.queries) == [[(0, 2), (1, 3), (2, 4)]]


def test_events_of_one_moment_are_history_of_neither() -> None:
    events = events_at([30, 40, 40, 40, 50])
    sequence = sequence_of(builder(10).for_training(events, stored([10, 20, 20])))
    assert sequence.rows.timestamp_ms_VT.tolist() == [[10, 20, 20, 30, 40, 40, 40]]
    moment = [(0, 4)] * 3
    assert runs(sequence.rows) == [[(0, 0), (0, 1), (0, 1), (0, 3), *moment]]
    assert runs(sequence.queries) == [[(0, 3), *moment, (0, 7)]]


def test_a_moment_cut_by_the_window_counts_whole() -> None:
    """Of two simultaneous rows only one is seen; it still sees what both of them see."""
    read = builder(2).for_reading(events_at([10, 20, 20, 30]), stored([5, 10, 20, 20, 30]))
    sequence = sequence_of(read)
    assert sequence.rows.timestamp_ms_VT.tolist() == [[5, 10, 20, 20]]
    assert runs(sequence.rows) == [[(0, 0), (0, 1), (0, 2), (0, 2)]]
    only_newest = sequence_of(builder(1).for_reading(events_at([30]), stored([5, 10, 20, 20])))
    assert only_newest.rows.timestamp_ms_VT.tolist() == [[20]]
    assert only_newest.rows.before_VT.tolist() == [[-2]]  # the first of the moment is not there


def test_users_with_most_rows_come_first_and_users_without_are_there() -> None:
    events = events_at([50, 50, 50, 60, 70], [0, 1, 2, 2, 2])
    sequence = sequence_of(builder(10).for_training(events, stored([10], [], [20, 30])))
    assert sequence.rows.length_V.tolist() == [4, 1, 0]  # users 2, 0, 1
    assert sequence.ordinal_UR[2].tolist() == [NOWHERE] * 4
    assert sequence.queries.length_V.tolist() == [3, 1, 1]
    assert sequence.queries.user_V.tolist() == [0, 1, 2]
    assert runs(sequence.queries) == [[(0, 2), (0, 3), (0, 4)], [(0, 1)], [(0, 0)]]
    # Queries keep the order of the batch: user 2 has places 0..2 of row 0, users 0 and 1 theirs.
    assert sequence.queries.place.tolist() == [3, 6, 0, 1, 2]


def test_a_late_event_sees_only_what_was_before_it() -> None:
    memory = InProcessMemory(Namespace(depth=0, dim=8, dtype="float32"))
    memory.save(np.zeros(4, np.int64), stored([10, 20, 30, 40]).rows)
    late = events_at([25])
    sequence = sequence_of(builder(10).for_training(late, fetch_for(late, memory, 10)))
    assert sequence.rows.timestamp_ms_VT.tolist() == [[10, 20]]
    assert runs(sequence.queries) == [[(0, 2)]]


def test_rows_that_no_query_sees_are_left_out() -> None:
    """Time travel: the slab has all rows, the queries are in the middle."""
    rows = stored(list(range(10, 100, 10)))
    sequence = sequence_of(builder(2).for_reading(events_at([40, 80]), rows))
    assert sequence.rows.timestamp_ms_VT.tolist() == [[20, 30, 60, 70]]
    # Ordinals count what is left out: 60 is at distance 3 of 30, and does not see it.
    assert sequence.ordinal_UR.tolist() == [[-8, -7, -4, -3]]
    assert runs(sequence.rows) == [[(0, 0), (0, 1), (2, 2), (2, 3)]]
    assert runs(sequence.queries) == [[(0, 2), (2, 4)]]


@pytest.mark.parametrize("num_rows", [0, 3])
def test_candidates_of_a_request_share_one_place(num_rows: int) -> None:
    rows = rows_of_user(Namespace(depth=0, dim=8, dtype="float32"), 1, num_rows)
    sequence = sequence_of(builder(10).for_candidates(rows, make_items(5), NOW_MS, 0))
    shared = sequence.queries.shared_by(5)
    assert shared.place.tolist() == [0, 1, 2, 3, 4]
    assert runs(shared) == [[(0, num_rows)] * 5]
    assert sequence.queries.shared_by(1) is sequence.queries
    assert sequence.queries.shared_by(0).shape == (1, 0)


def test_a_batch_without_events_has_no_places() -> None:
    nobody = EventBatch.empty()
    empty = UserRows(np.zeros(0, np.int64), np.zeros(1, np.int64), stored([1]).rows[:0])
    for inputs in (builder(3).for_training(nobody, empty), builder(3).for_reading(nobody, empty)):
        sequence = sequence_of(inputs)
        assert sequence.num_rows == 0
        assert sequence.queries.shape == (0, 0)


def test_other_methods_pay_nothing() -> None:
    inputs = builder(3, method="stca").for_training(events_at([30]), stored([10]))
    assert inputs.sequence is None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 63), st.booleans())
def test_queries_see_what_the_views_show(seed: int, n: int, start: int, reading: bool) -> None:
    """The runs of the sequences and the visibility that other methods use are the same."""
    events, inputs_of = deep_events(), builder(n)
    past, batch = events.take(slice(0, start)), events.take(slice(start, 64))
    batch = batch.take(np.random.default_rng(seed).random(len(batch)) < 0.7)
    memory = InProcessMemory(Namespace(depth=0, dim=8, dtype="float32"))
    memory.save(past.user_id, raw_rows(past, memory.namespace.row_dtype))
    if reading:
        memory.save(batch.user_id, raw_rows(batch, memory.namespace.row_dtype))
        inputs = inputs_of.for_reading(batch, memory.fetch(np.unique(batch.user_id), 100))
    else:
        inputs = inputs_of.for_training(batch, fetch_for(batch, memory, n))
    sequence = sequence_of(inputs)
    num_rows = sequence.ordinal_UR.shape[1]
    num_columns = inputs.slab.slots_UNK.shape[1]
    source_of = dict(zip(sequence.rows.place.tolist(), range(sequence.num_rows), strict=True))
    num_stored = len(sequence.slab_source)
    for query in range(len(batch)):
        place = int(sequence.queries.place[query])
        v, t = divmod(place, sequence.queries.shape[1])
        user = int(sequence.queries.user_V[v])
        first, end = sequence.queries.first_VT[v, t], sequence.queries.end_VT[v, t]
        got = {source_of[user * num_rows + r] for r in range(first, end)}
        visible_N = inputs.slab.view.visible[query]
        flat = inputs.slab.user_row_B[query] * num_columns + np.flatnonzero(visible_N)
        expected = set(np.flatnonzero(np.isin(sequence.slab_source, flat)).tolist())
        if inputs.block is not None:
            own = np.flatnonzero(inputs.block.view.visible[query])
            at = np.flatnonzero(np.isin(sequence.block_source, own)) + num_stored
            expected |= set(at.tolist())
            assert len(expected) == visible_N.sum() + len(own)
        assert got == expected


def test_the_sample_has_the_cases_that_matter() -> None:
    events = deep_events()
    assert len(np.unique(events.timestamp_ms)) < len(events) / 2
    assert {LATE_USER, EMPTY_USER} <= set(events.user_id.tolist())
