"""int8 rows: the documented error bound, and that moving them on changes nothing."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from cache_actors.store.row_formats import as_read, decode, encode
from marm.memory import Namespace

DEPTH, DIM = 2, 5
NAMESPACE = Namespace(depth=DEPTH, dim=DIM, dtype="int8")

# All magnitudes of float16, its smallest numbers and both zeros included.
MEMORY = st.integers(1, 6).flatmap(
    lambda count: arrays(
        np.float16,
        (count, DEPTH, DIM),
        elements=st.floats(width=16, allow_nan=False, allow_infinity=False),
    )
)
FEW_SMALLEST_STEPS = st.integers(1, 6).flatmap(
    lambda count: arrays(np.int64, (count, DEPTH, DIM), elements=st.integers(-300, 300)).map(
        lambda steps: (steps * 2.0**-24).astype(np.float16)
    )
)


def rows_with(memory: NDArray[np.float16]) -> NDArray[np.void]:
    rows = np.zeros(len(memory), NAMESPACE.row_dtype)
    rows["memory"] = memory
    return rows


@settings(max_examples=400, deadline=None)
@given(memory=st.one_of(MEMORY, FEW_SMALLEST_STEPS))
def test_the_error_is_within_the_documented_bound(memory: NDArray[np.float16]) -> None:
    exact = memory.astype(np.float64)
    got = as_read(NAMESPACE, rows_with(memory))["memory"].astype(np.float64)
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    bound = largest / 254 + largest / 2048 + 2.0**-25
    assert (np.abs(got - exact) <= bound * (1 + 1e-6)).all()
    is_largest = np.abs(exact) == largest
    np.testing.assert_array_equal(got[is_largest], exact[is_largest])


@settings(max_examples=400, deadline=None)
@given(memory=st.one_of(MEMORY, FEW_SMALLEST_STEPS))
def test_encoding_what_was_decoded_changes_no_byte(memory: NDArray[np.float16]) -> None:
    stored = encode(NAMESPACE, rows_with(memory))
    again = encode(NAMESPACE, decode(NAMESPACE, stored))
    assert again.tobytes() == stored.tobytes()
