"""Reading a user's rows for a request: a miss or a dead shard is fewer rows, never an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from marm.memory import RAW_STEP, Namespace, UserRows
from stages.request import RowsRead, StageRequest


class MemoryReader(Protocol):
    """The part of a memory client that serving needs; `cache_actors` provides it."""

    @property
    def namespace(self) -> Namespace:
        """The namespace that is read."""
        ...

    def fetch_available(
        self, user_ids: NDArray[np.int64], n: int, before_ms: NDArray[np.int64] | None = None
    ) -> tuple[UserRows, NDArray[np.bool_]]:
        """Rows as of `marm.memory.Memory.fetch`, and which users' shard did not answer."""
        ...


@dataclass(frozen=True)
class History:
    """One user's rows for one request, and the moment to score at."""

    rows: UserRows
    now_ms: int
    read: RowsRead

    @property
    def item_ids(self) -> NDArray[np.int64]:
        """Items of the rows, oldest first."""
        return self.rows.rows["item_id"]


def read_history(memory: MemoryReader, request: StageRequest, n: int, depth: int) -> History:
    """The newest ``n`` rows of the request's user, for a model of ``depth`` cached layers."""
    before_ms = None if request.before_ms is None else np.array([request.before_ms], np.int64)
    rows, missing = memory.fetch_available(np.array([request.user_id], np.int64), n, before_ms)
    memorised = int((rows.rows["written_step"] != RAW_STEP).sum())
    # Clocks of machines differ a little: a row is history of this request even when its time
    # stamp came from a machine that runs ahead.
    newest_ms = int(rows.rows["timestamp_ms"][-1]) if len(rows.rows) else 0
    return History(
        rows=rows,
        now_ms=max(request.now_ms, newest_ms + 1),
        read=RowsRead(
            depth=depth if memorised else 0,
            raw=len(rows.rows) - memorised,
            memorised=memorised,
            missing=bool(missing[0]),
        ),
    )
