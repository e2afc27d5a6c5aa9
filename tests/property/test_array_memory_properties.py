"""The growing store holds and gives exactly what the plain one does, whatever is saved."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_events import make_rows

from marm.memory import RAW_STEP, InProcessMemory, Namespace
from marm.memory_arrays import ArrayMemory

NAMESPACE = Namespace(depth=1, dim=2, dtype="float32")

ROW = st.tuples(  # (user, time, key, step, feedback)
    st.integers(0, 2),
    st.integers(0, 40),
    st.integers(0, 3),
    st.sampled_from([RAW_STEP, 1, 2]),
    st.integers(0, 7),
)
SAVES = st.lists(st.lists(ROW, max_size=12), max_size=25)


@settings(max_examples=100, deadline=None)
@given(
    saves=SAVES,
    in_order=st.booleans(),
    max_rows=st.sampled_from([None, 1, 3, 10]),
    n=st.integers(0, 12),
    before=st.lists(st.integers(-1, 60), min_size=4, max_size=4),
)
def test_array_memory_equals_in_process_memory(
    saves: list[list[tuple[int, int, int, int, int]]],
    in_order: bool,
    max_rows: int | None,
    n: int,
    before: list[int],
) -> None:
    """Late, repeated and raw rows, several of a user in one save, reads back in time."""
    plain, arrays = InProcessMemory(NAMESPACE, max_rows), ArrayMemory(NAMESPACE, max_rows)
    asked = np.array([2, 0, 7, 1], np.int64)
    limits = np.array(before, np.int64)
    for number, save in enumerate(saves):
        later = 41 * number if in_order else 0
        rows = make_rows(NAMESPACE, [one[1] + later for one in save], 0, [one[2] for one in save])
        rows["written_step"] = [one[3] for one in save]
        rows["memory"][:, 0, 0] = [
            0 if one[3] == RAW_STEP else 10 * one[3] + number for one in save
        ]
        rows["feedback"] = [one[4] for one in save]
        owners = np.array([one[0] for one in save], np.int64)
        plain.save(owners, rows.copy())
        arrays.save(owners, rows.copy())
        for limit in (None, limits, limits + later):
            expected, got = plain.fetch(asked, n, limit), arrays.fetch(asked, n, limit)
            np.testing.assert_array_equal(got.offsets, expected.offsets)
            np.testing.assert_array_equal(got.rows, expected.rows)
    everything = arrays.fetch(asked, 10_000)
    assert arrays.num_rows == len(everything.rows) == len(plain.fetch(asked, 10_000).rows)


def test_fetched_rows_are_not_changed_by_later_saves() -> None:
    memory = ArrayMemory(NAMESPACE, 2)
    user = np.zeros(1, np.int64)
    memory.save(user, make_rows(NAMESPACE, [0], 5))
    fetched = memory.fetch(user, 2)
    for time_ms in range(100):
        memory.save(user, make_rows(NAMESPACE, [time_ms], 6))
    assert fetched.rows["written_step"].tolist() == [5]
    assert memory.fetch(user, 9).rows["timestamp_ms"].tolist() == [98, 99]


def test_a_bound_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ArrayMemory(NAMESPACE, 0)
