"""Reading a user's rows for a request: a miss or a dead shard is fewer rows, never an error."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from marm.memory import RAW_STEP, Namespace, UserRows
from stages.depth import first_layers
from stages.request import RowsRead, StageRequest

DEFAULT_READ_MS = 300.0
"""What reading rows may take where nothing else is configured."""

READ_SHARE = 0.5
"""Of the time a request has left, reading rows may take at most this share."""

FIRST_SHARE = 2 / 3
"""Of the time for reading, what the full rows may take before raw rows are asked for."""


class MemoryReader(Protocol):
    """The part of a memory client that serving needs; `cache_actors` provides it."""

    @property
    def namespace(self) -> Namespace:
        """The namespace that is read."""
        ...

    def fetch_available(
        self,
        user_ids: NDArray[np.int64],
        n: int,
        before_ms: NDArray[np.int64] | None = None,
        *,
        layers: int | None = None,
        timeout_s: float | None = None,
    ) -> tuple[UserRows, NDArray[np.bool_]]:
        """Rows as of `marm.memory.Memory.fetch` with their first ``layers`` layers (None: all), and
        which users' shard did not answer within ``timeout_s`` (None: the reader's own limit)."""
        ...


@dataclass(frozen=True)
class History:
    """One user's rows for one request, and the moment to score at.

    ``note`` says when less was read than was asked for, though the shard did answer.
    """

    rows: UserRows
    now_ms: int
    read: RowsRead
    note: str = ""

    def __len__(self) -> int:
        return len(self.rows.rows)

    @property
    def item_ids(self) -> NDArray[np.int64]:
        """Items of the rows, oldest first."""
        return self.rows.rows["item_id"]

    @property
    def depth(self) -> int:
        """Layers that the rows have vectors of."""
        return int(self.rows.rows.dtype["memory"].shape[0])

    def at_depth(self, depth: int) -> History:
        """The same history with the vectors of the first ``depth`` layers only."""
        rows = first_layers(self.rows, depth)
        return replace(self, rows=rows, read=rows_read(rows, self.read.missing))

    def without_rows(self) -> History:
        """The same moment with nothing known of the user."""
        rows = UserRows(self.rows.user_ids, np.zeros(2, np.int64), self.rows.rows[:0])
        return replace(self, rows=rows, read=rows_read(rows, self.read.missing))


def read_history(
    memory: MemoryReader,
    request: StageRequest,
    n: int,
    depth: int,
    read_ms: float = DEFAULT_READ_MS,
) -> History:
    """The newest ``n`` rows of the request's user, for a model of ``depth`` cached layers.

    Reading takes at most ``read_ms`` and half of what is left until the request's deadline. When
    the full rows did not come in two thirds of that, raw rows are asked for: less to find and to
    send. When those did not come either, there are no rows.
    """
    left_ms = request.deadline_ms - time.time() * 1000
    budget_s = max(0.0, min(read_ms, left_ms * READ_SHARE)) / 1000
    began_s = time.monotonic()
    first_s = budget_s * (FIRST_SHARE if depth else 1.0)
    rows, missing = _fetch(memory, request, n, depth, first_s)
    note = ""
    left_s = budget_s - (time.monotonic() - began_s)
    if missing and depth and left_s > 0:
        rows, missing = _fetch(memory, request, n, 0, left_s)
        note = "" if missing else f"memory did not answer in {first_s * 1e3:.0f} ms, so raw rows"
    # Clocks of machines differ a little: a row is history of this request even when its time
    # stamp came from a machine that runs ahead.
    newest_ms = int(rows.rows["timestamp_ms"][-1]) if len(rows.rows) else 0
    now_ms = max(request.now_ms, newest_ms + 1)
    return History(rows, now_ms, rows_read(rows, missing), note)


def _fetch(
    memory: MemoryReader, request: StageRequest, n: int, depth: int, timeout_s: float
) -> tuple[UserRows, bool]:
    before_ms = None if request.before_ms is None else np.array([request.before_ms], np.int64)
    rows, missing = memory.fetch_available(
        np.array([request.user_id], np.int64), n, before_ms, layers=depth, timeout_s=timeout_s
    )
    return rows, bool(missing[0])


def rows_read(rows: UserRows, missing: bool) -> RowsRead:
    """What one user's ``rows`` amount to. At depth 0 no vector is used, so all rows are raw."""
    depth = int(rows.rows.dtype["memory"].shape[0])
    memorised = int((rows.rows["written_step"] != RAW_STEP).sum()) if depth else 0
    return RowsRead(
        depth=depth if memorised else 0,
        raw=len(rows.rows) - memorised,
        memorised=memorised,
        missing=missing,
    )
