"""Refusing rows before anything is stored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.errors import NamespaceMismatchError
from marm.memory import Namespace

_EXPONENTS = {
    2: (np.uint16, 0x7C00, np.uint16(0x7FFF)),
    4: (np.uint32, 0x7F800000, np.uint32(0x7FFFFFFF)),
}


def check_rows(namespace: Namespace, user_ids: NDArray[np.int64], rows: NDArray[np.void]) -> None:
    """Refuse rows that are not of ``namespace``, not one per user id, or not finite."""
    if rows.dtype != namespace.row_dtype:
        raise NamespaceMismatchError.of("the array to save", namespace, rows.dtype)
    if user_ids.shape != rows.shape or rows.ndim != 1:
        raise ValueError(
            f"save needs one user id per row, got {user_ids.shape} ids for {rows.shape} rows"
        )
    memory = rows["memory"]
    if not memory.size:
        return
    # All exponent bits set is infinite or not a number; far cheaper than isfinite on float16.
    bits, exponent, magnitude = _EXPONENTS[memory.dtype.itemsize]
    if (memory.view(bits) & magnitude).max() >= exponent:
        bad = np.flatnonzero(~np.isfinite(memory).all(axis=(1, 2)))
        raise ValueError(
            f"memory vectors must be finite, but {len(bad)} of {len(rows)} rows are not, the first "
            f"of user {int(user_ids[bad[0]])}; nothing of this batch was stored. Look for "
            f"diverging training or values beyond {namespace.dtype}"
        )
