"""The memory as data: rows, namespaces, batches of rows, and an in-process store (Eq. 3, 4, 7, 8).

A user's memory is a run of rows in time order, one per event that enters the sequence. All layers
of an event live in one row, so one read serves every layer; the row is found by its user and its
exact event key, never by a hash alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from marm.addressing import user_bucket
from marm.events import TASKS, merge_feedback

RAW_STEP = -1
"""``written_step`` of a row that was ingested but not yet computed by training."""

ROW_DTYPES = ("float16", "float32", "int8")
"""How a namespace keeps its memory. ``int8`` has one scale per row and layer; callers see float16.
"""

_STORED_WORD_BYTES = 8
_SCAN_USERS = 256

_EVENT_FIELDS: list[tuple[str, Any]] = [
    ("event_key", np.uint64),
    ("item_id", np.int64),
    ("timestamp_ms", np.int64),
    ("author_id", np.int64),
    ("tag_id", np.int64),
    ("context_id", np.int32),
    ("feedback", np.uint32),
    ("written_step", np.int32),
    ("written_s", np.uint32),
]

EVENT_BYTES = np.dtype(_EVENT_FIELDS).itemsize
"""Bytes of a row before its memory, in every namespace and at rest."""


@dataclass(frozen=True)
class Namespace:
    """Identity of a memory: rows of different namespaces never mix.

    ``sequence`` names the events that become rows: ``"all"``, or a task such as ``"long_view"``
    whose label must be positive (Section 2.1.1 of the paper). ``epoch`` is raised to start afresh.
    """

    family: str = "ranking"
    depth: int = 2  # L
    dim: int = 32  # D
    dtype: str = "float16"
    epoch: int = 0
    sequence: str = "all"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.family):
            raise ValueError(
                f"namespace family must match [a-z][a-z0-9_]*, got {self.family!r}; rename it"
            )
        if self.depth < 0 or self.dim < 1 or self.epoch < 0:
            raise ValueError(
                "namespace needs depth >= 0, dim >= 1 and epoch >= 0, "
                f"got depth={self.depth}, dim={self.dim}, epoch={self.epoch}"
            )
        if self.dtype not in ROW_DTYPES:
            raise ValueError(f"namespace dtype must be one of {ROW_DTYPES}, got {self.dtype!r}")
        if self.sequence != "all" and self.sequence not in TASKS:
            raise ValueError(f"sequence must be 'all' or a task of {TASKS}, got {self.sequence!r}")

    @property
    def name(self) -> str:
        """A file-system and actor-name safe name that determines every field."""
        return f"{self.family}-l{self.depth}-d{self.dim}-{self.dtype}-{self.sequence}-e{self.epoch}"

    @property
    def memory_dtype(self) -> np.dtype:
        """The numbers callers see in ``memory``: float16 for an int8 namespace."""
        return np.dtype("float16" if self.dtype == "int8" else self.dtype)

    @cached_property
    def row_dtype(self) -> np.dtype:
        """Layout of one row; ``memory`` is ``[L, D]`` and holds y_1..y_L of Eq. (6).

        ``written_step`` and ``written_s`` are the training step and the Unix time in seconds that
        computed it: what staleness is measured by.
        """
        return _row_dtype(self.memory_dtype, self.depth, self.dim)

    def layers_dtype(self, layers: int | None) -> np.dtype:
        """``row_dtype`` with only the first ``layers`` layers of ``memory`` (None: all of them).

        With 0 layers ``memory`` is still there, of shape ``[0, D]``: code that reads rows of any
        selection needs no second case.
        """
        if layers is not None and not 0 <= layers <= self.depth:
            raise ValueError(
                f"layers must be None or between 0 and the depth {self.depth} of {self.name}, "
                f"got {layers}"
            )
        if layers is None or layers == self.depth:
            return self.row_dtype
        return _row_dtype(self.memory_dtype, layers, self.dim)

    @cached_property
    def stored_dtype(self) -> np.dtype:
        """Layout of one row at rest: ``row_dtype``, or for int8 its quantized form.

        An int8 row has ``scale`` (float32 ``[L]``) before its int8 ``memory``. Rows are checked and
        moved as 8-byte words, so a layout that is no multiple of 8 bytes ends in a ``pad`` of zero
        bytes (a field, not a gap: numpy leaves gaps uninitialised, and these bytes are checked). It
        comes last so that the first layers of a row stay the first bytes of a stored one.
        """
        fields: list[tuple[str, Any, Any]] = [(name, kind, ()) for name, kind in _EVENT_FIELDS]
        if self.dtype == "int8":
            fields.append(("scale", np.float32, (self.depth,)))
        fields.append(("memory", self.dtype, (self.depth, self.dim)))
        pad_bytes = -np.dtype(fields).itemsize % _STORED_WORD_BYTES
        if pad_bytes:
            fields.append(("pad", np.uint8, (pad_bytes,)))
        return np.dtype(fields)


def _row_dtype(numbers: np.dtype, layers: int, dim: int) -> np.dtype:
    return np.dtype([*_EVENT_FIELDS, ("memory", numbers, (layers, dim))])


@dataclass(frozen=True)
class UserRows:
    """Rows of ``U`` users, packed: user ``u`` owns ``rows[offsets[u]:offsets[u + 1]]``, oldest
    first. ``rows`` has a namespace's ``row_dtype``."""

    user_ids: NDArray[np.int64]  # [U]
    offsets: NDArray[np.int64]  # [U + 1]
    rows: NDArray[np.void]  # [R]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of rows of each user, ``[U]``."""
        return np.diff(self.offsets)

    def of(self, index: int) -> NDArray[np.void]:
        """Rows of the user at position ``index``."""
        return self.rows[self.offsets[index] : self.offsets[index + 1]]

    def newest_first(self, n: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Positions in ``rows`` of every user's newest ``n`` rows as ``[U, n]``, newest first, and
        which of them exist. Absent places hold position 0: use the mask, never the value."""
        rank = np.arange(n, dtype=np.int64)
        present = rank[None, :] < self.counts[:, None]
        position = self.offsets[1:, None] - 1 - rank[None, :]
        return np.where(present, position, 0), present


class Ack(Protocol):
    """A save under way."""

    def done(self) -> bool:
        """Whether the save is acknowledged, without waiting."""
        ...

    def wait(self, timeout_s: float | None = None) -> None:
        """Return once every row is acknowledged; raise if any was not stored."""
        ...


class Memory(Protocol):
    """What training and serving need of a memory; every store implements it."""

    @property
    def namespace(self) -> Namespace:
        """The namespace this handle reads and writes."""
        ...

    def fetch(
        self, user_ids: NDArray[np.int64], n: int, before_ms: NDArray[np.int64] | None = None
    ) -> UserRows:
        """``MARMCacheLookUp`` of Eq. (4) for a batch of distinct users.

        Every user's newest ``n`` rows with ``timestamp_ms`` strictly below ``before_ms[u]`` (all
        rows when ``before_ms`` is None). Users without rows get an empty run.
        """
        ...

    def save(self, user_ids: NDArray[np.int64], rows: NDArray[np.void]) -> Ack:
        """``MARMCacheSave`` of Eq. (8): upsert ``rows[i]`` of ``user_ids[i]`` by event key.

        Idempotent. A raw row never erases a computed one; feedback of both is merged.
        """
        ...


class ScannableMemory(Protocol):
    """A memory that can be read from end to end, bucket by bucket."""

    @property
    def namespace(self) -> Namespace:
        """The namespace of the rows."""
        ...

    def scan(self, bucket: int) -> Iterator[UserRows]:
        """All rows of all users of ``bucket`` (`marm.addressing.user_bucket`), some users at a
        time; every user comes once."""
        ...


def upsert_rows(old: NDArray[np.void], new: NDArray[np.void]) -> NDArray[np.void]:
    """One user's rows after an upsert of ``new``, sorted by (timestamp_ms, event_key).

    Rows with the same timestamp and event key are one event: the later one in ``new`` wins, except
    that a raw row keeps an already stored memory and that feedback is merged.
    """
    rows = np.concatenate([old, new])
    if len(old) == 0 and len(new) == 1:
        return rows
    if len(new) and len(old):
        times = new["timestamp_ms"]  # compared, not subtracted: a difference may overflow
        is_append = times[0] > old["timestamp_ms"][-1] and np.all(times[1:] > times[:-1])
        if is_append:
            return rows
    latest: dict[tuple[int, int], int] = {}
    for index in range(len(rows)):
        key = (int(rows["timestamp_ms"][index]), int(rows["event_key"][index]))
        earlier = latest.get(key)
        if earlier is not None:
            feedback = merge_feedback(rows["feedback"][earlier], rows["feedback"][index])
            if rows["written_step"][index] == RAW_STEP:
                rows["memory"][index] = rows["memory"][earlier]
                rows["written_step"][index] = rows["written_step"][earlier]
                rows["written_s"][index] = rows["written_s"][earlier]
            rows["feedback"][index] = feedback
        latest[key] = index
    kept = rows[np.fromiter(latest.values(), np.int64, len(latest))]
    return kept[np.lexsort((kept["event_key"], kept["timestamp_ms"]))]


class DoneAck:
    """The acknowledgement of a save that finished before it returned."""

    def done(self) -> bool:
        """Always true."""
        return True

    def wait(self, timeout_s: float | None = None) -> None:
        """Return at once."""


class InProcessMemory:
    """The reference store: one array per user in this process. Nothing survives the process."""

    def __init__(self, namespace: Namespace, max_rows_per_user: int | None = None) -> None:
        self._namespace = namespace
        self._max_rows = max_rows_per_user
        self._users: dict[int, NDArray[np.void]] = {}

    @property
    def namespace(self) -> Namespace:
        """The namespace of all rows here."""
        return self._namespace

    def fetch(
        self, user_ids: NDArray[np.int64], n: int, before_ms: NDArray[np.int64] | None = None
    ) -> UserRows:
        """See `Memory.fetch`."""
        offsets = np.zeros(len(user_ids) + 1, np.int64)
        parts = []
        for index, user_id in enumerate(np.asarray(user_ids).tolist()):
            rows = self._users.get(user_id)
            if rows is not None:
                end = len(rows)
                if before_ms is not None:
                    end = int(np.searchsorted(rows["timestamp_ms"], before_ms[index]))
                rows = rows[max(0, end - n) : end]
                parts.append(rows)
            offsets[index + 1] = offsets[index] + (0 if rows is None else len(rows))
        packed = np.concatenate(parts) if parts else np.empty(0, self._namespace.row_dtype)
        return UserRows(np.asarray(user_ids, np.int64), offsets, packed)

    def scan(self, bucket: int) -> Iterator[UserRows]:
        """See `ScannableMemory.scan`; users in the order of their ids."""
        users = np.array(sorted(self._users), np.int64)
        users = users[user_bucket(users) == bucket]
        for start in range(0, len(users), _SCAN_USERS):
            part = users[start : start + _SCAN_USERS]
            yield self.fetch(part, max(len(self._users[user]) for user in part.tolist()))

    def save(self, user_ids: NDArray[np.int64], rows: NDArray[np.void]) -> DoneAck:
        """See `Memory.save`."""
        empty = np.empty(0, self._namespace.row_dtype)
        order = np.argsort(user_ids, kind="stable")
        ids, starts = np.unique(user_ids[order], return_index=True)
        for user_id, run in zip(ids.tolist(), np.split(order, starts[1:]), strict=False):
            merged = upsert_rows(self._users.get(user_id, empty), rows[run])
            if self._max_rows is not None:
                merged = merged[-self._max_rows :]
            self._users[user_id] = merged
        return DoneAck()
