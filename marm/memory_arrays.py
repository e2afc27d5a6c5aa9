"""An in-process store for long histories: saving a row costs the same however many came before.

`marm.memory.InProcessMemory` is the plain statement of what a store does, and copies a user's whole
history at every save. `ArrayMemory` does the same with one growing array per user.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

from marm.memory import DoneAck, Namespace, UserRows, upsert_rows

_FIRST_PLACES = 16


class ArrayMemory:
    """Equal to `InProcessMemory` with the same bound, row for row. Nothing survives the process.

    Rows newer than everything of their user go behind it, in amortised constant time. Late and
    repeated rows move the rows that are newer than the oldest of them. A user takes at most four
    places for a row that is kept, beside those of one save.
    """

    def __init__(self, namespace: Namespace, max_rows_per_user: int | None = None) -> None:
        if max_rows_per_user is not None and max_rows_per_user < 1:
            raise ValueError(
                f"max_rows_per_user must be None or at least 1, got {max_rows_per_user}"
            )
        self._namespace = namespace
        self._max_rows = max_rows_per_user
        self._runs: dict[int, _Run] = {}

    @property
    def namespace(self) -> Namespace:
        """The namespace of all rows here."""
        return self._namespace

    @property
    def num_rows(self) -> int:
        """Rows held now."""
        return sum(run.end - run.start for run in self._runs.values())

    def fetch(
        self, user_ids: NDArray[np.int64], n: int, before_ms: NDArray[np.int64] | None = None
    ) -> UserRows:
        """See `marm.memory.Memory.fetch`."""
        limits = [None] * len(user_ids) if before_ms is None else before_ms.tolist()
        offsets = np.zeros(len(user_ids) + 1, np.int64)
        parts = [np.empty(0, self._namespace.row_dtype)]
        users = np.asarray(user_ids, np.int64)
        for index, (user_id, limit_ms) in enumerate(zip(users.tolist(), limits, strict=True)):
            run = self._runs.get(user_id)
            count = 0
            if run is not None:
                end = run.end if limit_ms is None else run.first_at(limit_ms)
                begin = max(run.start, end - n)
                parts.append(run.rows[begin:end])
                count = end - begin
            offsets[index + 1] = offsets[index] + count
        return UserRows(users, offsets, np.concatenate(parts))

    def save(self, user_ids: NDArray[np.int64], rows: NDArray[np.void]) -> DoneAck:
        """See `marm.memory.Memory.save`."""
        if not len(rows):
            return DoneAck()
        order = np.argsort(user_ids, kind="stable")
        ids, starts = np.unique(user_ids[order], return_index=True)
        ordered, stamps = rows[order], rows["timestamp_ms"][order]
        edges = [*starts.tolist(), len(order)]
        for user_id, begin, end in zip(ids.tolist(), edges[:-1], edges[1:], strict=True):
            run = self._runs.get(user_id)
            if run is None:
                run = self._runs[user_id] = _Run(self._namespace.row_dtype)
            run.upsert(ordered[begin:end], stamps[begin:end])
            if self._max_rows is not None:
                run.start = max(run.start, run.end - self._max_rows)
        return DoneAck()


class _Run:
    """Rows of one user: ``rows[start:end]``, oldest first."""

    __slots__ = ("_stamps", "end", "rows", "start")

    def __init__(self, row_dtype: np.dtype) -> None:
        self.rows = np.empty(_FIRST_PLACES, row_dtype)
        # Beside the rows, as a search through a column of wide rows would copy the column.
        self._stamps = np.empty(_FIRST_PLACES, np.int64)
        self.start = self.end = 0

    def first_at(self, time_ms: int) -> int:
        """Place of the first row at ``time_ms`` or later."""
        if self.end == self.start or self._stamps[self.end - 1] < time_ms:
            return self.end
        return bisect_left(self._stamps, time_ms, self.start, self.end)

    def upsert(self, new: NDArray[np.void], stamps: NDArray[np.int64]) -> None:
        """`marm.memory.upsert_rows` in place; no row before the oldest of ``new`` can change."""
        is_ordered = len(new) == 1 or bool(np.all(stamps[1:] > stamps[:-1]))
        if is_ordered and (self.end == self.start or stamps[0] > self._stamps[self.end - 1]):
            self._append(new)
            return
        place = self.first_at(int(stamps.min()))
        merged = upsert_rows(self.rows[place : self.end], new)
        self.end = place
        self._append(merged)

    def _append(self, new: NDArray[np.void]) -> None:
        if self.end + len(new) > len(self.rows):
            self._make_room(len(new))
        end = self.end + len(new)
        self.rows[self.end : end] = new
        self._stamps[self.end : end] = new["timestamp_ms"]
        self.end = end

    def _make_room(self, wanted: int) -> None:
        """Move the run to the front; into twice the places unless half of these become free."""
        count = self.end - self.start
        places = len(self.rows)
        while 2 * (count + wanted) > places:
            places *= 2
        rows = self.rows if places == len(self.rows) else np.empty(places, self.rows.dtype)
        stamps = self._stamps if places == len(self._stamps) else np.empty(places, np.int64)
        # numpy copies correctly also where the two ranges overlap.
        rows[:count] = self.rows[self.start : self.end]
        stamps[:count] = self._stamps[self.start : self.end]
        self.rows, self._stamps, self.start, self.end = rows, stamps, 0, count
