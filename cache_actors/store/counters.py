"""Counts of a namespace, kept in the transaction that changes them."""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass

_LAYOUT = struct.Struct("<11q")


@dataclass
class NamespaceCounters:
    """What a namespace holds and what happened to it since it was made.

    Attributes:
        users: users with rows.
        rows: rows on disk.
        places: row places in use, with the unused part of extents.
        newest_step: largest ``written_step`` saved.
        evicted_users: users of whom rows were dropped that the durable tier, or the log, has.
        evictions: users evicted, ever.
        evicted_unsaved: of these, users whose newest change the durable tier did not have.
        expired: users removed because nothing was written to them for too long.
        damaged_rows: rows dropped because they failed their check.
        forgotten_rows: rows refused or removed because their user asked to be forgotten.
        saves: transactions that saved rows.
    """

    users: int = 0
    rows: int = 0
    places: int = 0
    newest_step: int = -1
    evicted_users: int = 0
    evictions: int = 0
    evicted_unsaved: int = 0
    expired: int = 0
    damaged_rows: int = 0
    forgotten_rows: int = 0
    saves: int = 0

    def pack(self) -> bytes:
        """The counters as stored."""
        return _LAYOUT.pack(*astuple(self))

    @staticmethod
    def unpack(data: bytes | memoryview | None) -> NamespaceCounters:
        """The counters in ``data``; all new where there are none."""
        return NamespaceCounters() if data is None else NamespaceCounters(*_LAYOUT.unpack(data))
