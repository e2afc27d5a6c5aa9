"""Half floats by integer arithmetic: every float16 there is, and rounding to the nearest."""

from __future__ import annotations

import numpy as np

from cache_actors.store.half_floats import narrow_into, widen

EVERY_HALF = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE = EVERY_HALF[np.isfinite(EVERY_HALF)]


def test_every_float16_widens_to_itself() -> None:
    assert widen(FINITE).tobytes() == FINITE.astype(np.float32).tobytes()


def test_what_is_not_finite_widens_to_something_beyond_float16() -> None:
    beyond = widen(EVERY_HALF[~np.isfinite(EVERY_HALF)])
    assert (np.abs(beyond) >= 65_536).all()


def test_every_float16_comes_back() -> None:
    halves = np.empty_like(FINITE)
    narrow_into(FINITE.astype(np.float32), halves)
    assert halves.tobytes() == FINITE.tobytes()


def test_numbers_between_round_to_the_nearest() -> None:
    rng = np.random.default_rng(0)
    magnitude = np.exp(rng.uniform(np.log(2.0**-26), np.log(65_519), 200_000))
    wide = (magnitude * rng.choice([-1, 1], len(magnitude))).astype(np.float32)
    halves = np.empty(len(wide), np.float16)
    narrow_into(wide.copy(), halves)
    error, least = (
        np.abs(numbers.astype(np.float64) - wide) for numbers in (halves, wide.astype(np.float16))
    )
    assert (error <= least + 2.0**-37).all()  # beyond that, float32 itself has no smaller steps


def test_strided_rows() -> None:
    rows = np.zeros(7, [("event", np.int64), ("memory", np.float16, (2, 3))])
    numbers = np.arange(42, dtype=np.float32).reshape(7, 2, 3) - 20
    narrow_into(numbers.copy(), rows["memory"])
    np.testing.assert_array_equal(widen(rows["memory"]), numbers)
