"""Index records: where a user's rows are.

    key    bucket u8 | user_id u64, big-endian with the sign bit flipped
    value  words of 8 bytes: check | newest timestamp_ms | newest event_key |
           version u32, written_s u32 | evicted rows u32, flags u32 | extents, oldest first
    extent start row u40 | size class u8 | rows u16

An extent is a run of 2 ** class places in the row file of the namespace. One record finds all rows
of a user, so a lookup is one search of the index however long the history is.

The words of a record add up to a constant plus the user's id, so a damaged record, or one of
another user, is never taken for a good one. Words have the machine's byte order.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marm.addressing import bucket_of_user, user_bucket

KEY_BYTES = 9
WORD_BYTES = 8
HEAD_WORDS = 5
HEAD_BYTES = HEAD_WORDS * WORD_BYTES

CHECK = 0x9E3779B97F4A7C15
"""What the words of a record or of a row add up to, plus the user's id, modulo 2 ** 64. Not zero,
so that a page of zeros is damage."""

START_SHIFT, CLASS_SHIFT = 24, 16
CLASS_MASK, COUNT_MASK = 0xFF, 0xFFFF
_SIGN = 1 << 63
_WORD_MASK, _HALF = (1 << 64) - 1, (1 << 32) - 1
_KEY = struct.Struct(">BQ")
_EMPTY = bytes(HEAD_BYTES)

NO_WORDS = (0,) * HEAD_WORDS
"""The words of a user without rows."""


class Flag:
    """Bits of what is special about a user; plain integers, for they are used per row."""

    EVICTED = 1
    """Rows were dropped that the durable tier, or the log, still has."""
    UNSAVED = 2
    """The durable tier does not have the newest change."""


def pack_extent(start: int, size_class: int, count: int) -> int:
    """``count`` rows at ``start`` of the row file, in a place for ``2 ** size_class``."""
    return (start << START_SHIFT) | (size_class << CLASS_SHIFT) | count


def extent_start(extent: int) -> int:
    """First place of an extent."""
    return extent >> START_SHIFT


def extent_class(extent: int) -> int:
    """Size class of an extent."""
    return (extent >> CLASS_SHIFT) & CLASS_MASK


def extent_count(extent: int) -> int:
    """Rows in an extent."""
    return extent & COUNT_MASK


@dataclass(frozen=True)
class Record:
    """One user's record."""

    newest_ms: int = 0
    newest_key: int = 0
    version: int = 0
    written_s: int = 0
    evicted_rows: int = 0
    flags: int = 0
    extents: tuple[int, ...] = ()  # packed, oldest first

    @property
    def num_rows(self) -> int:
        """Rows stored, including those beyond the user's limit."""
        return sum(map(extent_count, self.extents))

    def pack(self, user_id: int) -> bytes:
        """The record as stored, with its check."""
        second = self.version | self.written_s << 32, self.evicted_rows | self.flags << 32
        newest_ms = self.newest_ms & _WORD_MASK
        words = (newest_ms, self.newest_key, *second, *self.extents)
        check = (CHECK + user_id - sum(words)) & _WORD_MASK
        return struct.pack(f"{len(words) + 1}Q", check, *words)

    @staticmethod
    def unpack(data: bytes | memoryview, user_id: int) -> Record | None:
        """The record in ``data``; None if it is damaged."""
        words = record_words(data, user_id)
        if words is None:
            return None
        return Record.of_words(words)

    @staticmethod
    def of_words(words: tuple[int, ...]) -> Record:
        """The record of words that were checked."""
        _, newest_ms, newest_key, version, evicted = words[:HEAD_WORDS]
        return Record(
            newest_ms - ((newest_ms >> 63) << 64),
            newest_key,
            version & _HALF,
            version >> 32,
            evicted & _HALF,
            evicted >> 32,
            words[HEAD_WORDS:],
        )


def record_words(data: bytes | memoryview, user_id: int) -> tuple[int, ...] | None:
    """The words of a record; None if it is damaged."""
    size = len(data)
    if size < HEAD_BYTES or size % WORD_BYTES:
        return None
    words = struct.unpack(f"{size // WORD_BYTES}Q", data)
    return None if (sum(words) - CHECK - user_id) & _WORD_MASK else words


def record_key(user_id: int) -> bytes:
    """The key of one user."""
    return _KEY.pack(bucket_of_user(user_id), user_id + _SIGN)


def record_keys(user_ids: NDArray[np.int64]) -> list[bytes]:
    """The keys of users."""
    packed = np.empty((len(user_ids), KEY_BYTES), np.uint8)
    packed[:, 0] = user_bucket(user_ids)
    unsigned = np.ascontiguousarray(user_ids, np.int64).view(np.uint64) ^ np.uint64(_SIGN)
    packed[:, 1:] = unsigned.astype(">u8").view(np.uint8).reshape(-1, 8)
    flat = packed.tobytes()
    return [flat[start : start + KEY_BYTES] for start in range(0, len(flat), KEY_BYTES)]


def user_of_key(key: bytes | memoryview) -> int:
    """The user a key belongs to."""
    return int.from_bytes(key[1:KEY_BYTES], "big") - _SIGN


def users_of_keys(keys: Sequence[bytes]) -> NDArray[np.int64]:
    """The users that keys belong to."""
    packed = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
    unsigned = np.ascontiguousarray(packed[:, 1:]).view(">u8")[:, 0].astype(np.uint64)
    return (unsigned ^ np.uint64(_SIGN)).view(np.int64)


@dataclass(frozen=True)
class RecordBatch:
    """Records of ``U`` users as columns; absent and damaged ones have no extents.

    ``words[starts[u]:starts[u + 1]]`` is the record of user ``u``.
    """

    words: NDArray[np.uint64]
    starts: NDArray[np.int64]  # [U + 1]
    absent: NDArray[np.bool_]  # [U]
    damaged: NDArray[np.bool_]  # [U]

    @staticmethod
    def of(values: Sequence[bytes | memoryview | None], user_ids: NDArray[np.int64]) -> RecordBatch:
        """The batch of the index values of ``user_ids``; None where there is none."""
        sizes = np.array([0 if value is None else len(value) for value in values], np.int64)
        absent = sizes == 0
        broken = ~absent & ((sizes % WORD_BYTES != 0) | (sizes < HEAD_BYTES))
        if not broken.any():
            if absent.any():
                values = [_EMPTY if value is None else value for value in values]
                sizes[absent] = HEAD_BYTES
            words = np.frombuffer(bytearray().join(values), np.uint64)  # type: ignore[arg-type]
            starts = np.zeros(len(sizes) + 1, np.int64)
            np.cumsum(sizes // WORD_BYTES, out=starts[1:])
            sums = np.add.reduceat(words, starts[:-1]) if len(sizes) else words
            broken = ~absent & (sums - user_ids.view(np.uint64) != np.uint64(CHECK))
            if not broken.any():
                return RecordBatch(words, starts, absent, broken)
        kept = [None if bad else value for value, bad in zip(values, broken | absent, strict=True)]
        batch = RecordBatch.of(kept, user_ids)
        damaged = broken | batch.damaged
        return RecordBatch(batch.words, batch.starts, batch.absent & ~damaged, damaged)

    @staticmethod
    def read(transaction: Any, index: Any, user_ids: NDArray[np.int64]) -> RecordBatch:
        """The records that a table has of ``user_ids``."""
        get = transaction.get
        return RecordBatch.of([get(key, None, index) for key in record_keys(user_ids)], user_ids)

    @property
    def newest_ms(self) -> NDArray[np.int64]:
        """Time of each user's newest row."""
        return self.words[self.starts[:-1] + 1].view(np.int64)

    @property
    def newest_key(self) -> NDArray[np.uint64]:
        """Event key of each user's newest row."""
        return self.words[self.starts[:-1] + 2]

    @property
    def version(self) -> NDArray[np.uint32]:
        """Number of changes of each record."""
        return (self.words[self.starts[:-1] + 3] & np.uint64(0xFFFFFFFF)).astype(np.uint32)

    @property
    def written_s(self) -> NDArray[np.int64]:
        """When each user was last written, in Unix seconds."""
        return (self.words[self.starts[:-1] + 3] >> np.uint64(32)).astype(np.int64)

    @property
    def flags(self) -> NDArray[np.uint32]:
        """`Flag` of each user."""
        return (self.words[self.starts[:-1] + 4] >> np.uint64(32)).astype(np.uint32)

    @property
    def num_extents(self) -> NDArray[np.int64]:
        """Extents of each user."""
        return np.diff(self.starts) - HEAD_WORDS

    def words_of(self, index: int) -> tuple[int, ...]:
        """One user's words."""
        return tuple(self.words[self.starts[index] : self.starts[index + 1]].tolist())

    def record(self, index: int) -> Record | None:
        """One user's record; None if it is absent or damaged."""
        if self.absent[index] or self.damaged[index]:
            return None
        return Record.of_words(self.words_of(index))
