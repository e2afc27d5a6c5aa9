"""Users and rows for measurements: any row of any user can be made again where it is compared."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from marm.addressing import combine64, mix64
from marm.memory import Namespace

_START_MS = 1_700_000_000_000
_STEP_MS = 1_000
_MEMORY_PATTERNS = 1024


def user_ids(num_users: int) -> NDArray[np.int64]:
    """Identifiers of the users 0..U-1, spread over all of int64's positive values."""
    ids = (mix64(np.arange(num_users)) >> np.uint64(1)).astype(np.int64)
    if len(np.unique(ids)) != num_users:
        raise ValueError(f"two of {num_users} users got one identifier; use another number")
    return ids


class RowMaker:
    """Makes row number ``sequence`` of a user. Contents are random but the same in every process.

    A table of patterns stands for the memory, so that making rows costs no more than a copy.
    """

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        rng = np.random.default_rng(0)
        shape = (_MEMORY_PATTERNS, namespace.depth, namespace.dim)
        self._patterns = rng.standard_normal(shape).astype(namespace.memory_dtype)

    def rows(self, users: NDArray[np.int64], sequence: NDArray[np.int64]) -> NDArray[np.void]:
        """Row ``sequence[i]`` of the user of identifier ``users[i]``; later rows have later times.

        All fields depend on the arguments alone.
        """
        rows = np.zeros(len(users), self.namespace.row_dtype)
        rows["event_key"] = combine64(users, sequence)
        rows["item_id"] = rows["event_key"] >> np.uint64(40)
        rows["timestamp_ms"] = _START_MS + sequence * _STEP_MS
        rows["author_id"] = rows["item_id"] % 10_007
        rows["tag_id"] = rows["item_id"] % 101
        rows["written_step"] = sequence % 1_000_000
        rows["written_s"] = _START_MS // 1_000
        rows["memory"] = self._patterns[rows["event_key"] % np.uint64(_MEMORY_PATTERNS)]
        return rows

    def users_rows(self, users: NDArray[np.int64], num_rows: int) -> NDArray[np.void]:
        """The first ``num_rows`` rows of every user, ``[U, num_rows]``."""
        every_user = np.repeat(users, num_rows)
        sequence = np.tile(np.arange(num_rows, dtype=np.int64), len(users))
        return self.rows(every_user, sequence).reshape(len(users), num_rows)


def as_bytes(rows: NDArray[np.void]) -> NDArray[np.void]:
    """The same rows as opaque items, which numpy copies whole instead of field by field."""
    return rows.view(np.dtype((np.void, rows.dtype.itemsize)))
