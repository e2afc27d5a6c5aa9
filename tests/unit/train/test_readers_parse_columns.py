from __future__ import annotations

import datetime as dt

import numpy as np
import pyarrow as pa
import pytest

from train.data.parse_columns import (
    MAX_TIMESTAMP_MS,
    guess_unit,
    integers,
    numbers,
    stable_id,
    stable_ids,
    timestamps_ms,
)

T0_MS = 1_600_000_000_000


def column(values: list, kind: pa.DataType | None = None) -> pa.ChunkedArray:
    """Values spread over two chunks, as tables from files are."""
    whole = pa.array(values, kind)
    return pa.chunked_array([whole.slice(0, 1), whole.slice(1)])


@pytest.mark.parametrize(
    ("given", "values", "null", "malformed"),
    [
        (column([3, None, -1], pa.int32()), [3, 0, -1], [1], []),
        (column([3.0, float("nan"), 2.5], pa.float64()), [3, 0, 0], [1], [2]),
        (column([1e300, None, -2.0], pa.float32()), [0, 0, -2], [1], [0]),
        (column([" 7", "x", "", None, "8.0"]), [7, 0, 0, 0, 8], [2, 3], [1]),
        (column(["99999999999999999999", "-5", "+6"]), [0, -5, 6], [], [0]),
        (column([2**63 + 1, 5], pa.uint64()), [0, 5], [], [0]),
        (column([True, None]), [0, 0], [1], [0]),
        (column(["a", "a"]).dictionary_encode(), [0, 0], [], [0, 1]),
    ],
)
def test_integers(given: pa.ChunkedArray, values: list, null: list, malformed: list) -> None:
    parsed = integers(given)
    np.testing.assert_array_equal(parsed.values, values)
    assert np.flatnonzero(parsed.is_null).tolist() == null
    assert np.flatnonzero(parsed.is_malformed).tolist() == malformed


def test_numbers_of_every_type() -> None:
    np.testing.assert_array_equal(numbers(column([True, False, None])), [1, 0, np.nan])
    np.testing.assert_array_equal(numbers(column([1, None, 3])), [1, np.nan, 3])
    np.testing.assert_array_equal(numbers(column(["1.5", "b", "1e2"])), [1.5, np.nan, 100])
    np.testing.assert_array_equal(numbers(column([b"1", b"2"])), [np.nan, np.nan])


@pytest.mark.parametrize(
    ("given", "unit"),
    [
        (column([T0_MS // 1000, None, T0_MS // 1000 + 1], pa.int64()), "s"),
        (column([T0_MS, None, T0_MS + 1_000], pa.int64()), "ms"),
        (column([T0_MS * 1_000, None, (T0_MS + 1_000) * 1_000]), "us"),
        (column([T0_MS * 1_000_000, None, (T0_MS + 1_000) * 1_000_000]), "ns"),
        (column([T0_MS / 1000, None, T0_MS / 1000 + 1.0]), "s"),
        (column([str(T0_MS), None, str(T0_MS + 1_000)]), "ms"),
        (column(["2020-09-13T12:26:40", None, "2020-09-13 12:26:41"]), "ms"),
        (
            column(
                [
                    dt.datetime(2020, 9, 13, 12, 26, 40),
                    None,
                    dt.datetime(2020, 9, 13, 12, 26, 41),
                ]
            ),
            "ms",
        ),
    ],
)
def test_timestamps_of_any_unit(given: pa.ChunkedArray, unit: str) -> None:
    assert guess_unit(given) == unit
    parsed = timestamps_ms(given, unit)
    assert parsed.values[[0, 2]].tolist() == [T0_MS, T0_MS + 1_000]
    assert parsed.is_null.tolist() == [False, True, False]
    assert not parsed.is_malformed.any()


def test_a_zone_is_respected() -> None:
    zone = dt.timezone(dt.timedelta(hours=8))
    given = column([dt.datetime(2020, 9, 13, 20, 26, 40, tzinfo=zone)])
    assert timestamps_ms(given, "s").values.tolist() == [T0_MS]


def test_impossible_times_are_malformed() -> None:
    parsed = timestamps_ms(column([-1, MAX_TIMESTAMP_MS, 5]), "ms")
    assert parsed.is_malformed.tolist() == [True, True, False]
    assert timestamps_ms(column(["soon", "", "later"]), "s").is_malformed.tolist() == [1, 0, 1]


def test_ids_of_text_are_stable_positive_and_leave_the_unknown_unknown() -> None:
    ids = stable_ids(column(["Drama", None, "", "Drama", "War"]))
    assert ids.tolist() == [stable_id("Drama"), 0, 0, stable_id("Drama"), stable_id("War")]
    assert stable_id("Drama") == 3760323087470813  # part of the stored format
    assert 0 < ids[0] < 1 << 52
