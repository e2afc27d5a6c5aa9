"""Random numbers that depend on what they are for, not on when they are drawn.

Every draw is a hash of (seed, user, event, purpose). So a stream of events is the same whatever
the order in which users are simulated, and a stretch of it can be simulated again exactly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from marm.addressing import combine64, mix64

_STEP = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(11)


def user_keys(seed: int, purpose: int, num_users: int) -> NDArray[np.uint64]:
    """One key per user for one purpose."""
    return combine64(seed, purpose, np.arange(num_users))


def derive(keys: NDArray[np.uint64], index: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The key of draw number ``index`` below each of ``keys``."""
    return mix64(keys + index.astype(np.uint64) * _STEP)


def uniforms(keys: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """``count`` uniforms in (0, 1) below each key, as ``[count, B]``."""
    counters = np.arange(1, count + 1, dtype=np.uint64) * _STEP
    bits = mix64(keys[None, :] + counters[:, None]) >> _SHIFT
    return (bits.astype(np.float64) + 0.5) * 2.0**-53


def signs(keys: NDArray[np.uint64], index: NDArray[np.int64]) -> NDArray[np.float64]:
    """A fixed +1 or -1 for each (key, index)."""
    top_bit = derive(keys, index) >> np.uint64(63)
    return top_bit.astype(np.float64) * 2.0 - 1.0


def unit_normals(keys: NDArray[np.uint64], index: NDArray[np.int64]) -> NDArray[np.float64]:
    """A fixed, nearly normal number of unit variance for each (key, index)."""
    bits = derive(keys, index)
    quarter = np.uint64(0xFFFF)
    total = np.zeros(len(bits), np.float64)
    for shift in (0, 16, 32, 48):
        total += ((bits >> np.uint64(shift)) & quarter).astype(np.float64)
    return (total / 65535.0 - 2.0) * np.sqrt(3.0)
