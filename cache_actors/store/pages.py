"""Pages: how a user's rows are cut into values of a sorted key-value store.

    key    bucket u8 | user_id u64 | timestamp_ms u64 | event_key u64     of the page's first row
    value  rows of the namespace's row_dtype, sorted by (timestamp_ms, event_key)

All integers of a key are big-endian with the sign bit flipped where they are signed, so that byte
order is numeric order: the pages of a user are neighbours in time order, and the newest rows
before a time are one seek and a short walk back. The bucket leads, so a bucket is one key range.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marm.addressing import user_bucket
from marm.memory import Namespace

Buffer = bytes | bytearray | memoryview
RowId = tuple[int, int]
"""(timestamp_ms, event_key): the order of rows within a user, and what makes a row unique."""

PREFIX_BYTES = 9
"""Length of the part of a key that names the bucket and the user."""

NEWEST = b"\xff" * 16
"""A key suffix at or after every page of a user."""

_SIGN = 1 << 63
_SUFFIX = struct.Struct(">QQ")
_STORE_PAGE_BYTES = 4096
_STORE_HEADER_BYTES = 16
_MIN_PAGE_UNITS, _MAX_PAGE_UNITS = 2, 8
_TARGET_ROWS_PER_PAGE = 64


def key_prefixes(user_ids: NDArray[np.int64]) -> list[bytes]:
    """The key prefix of each user."""
    packed = np.empty((len(user_ids), PREFIX_BYTES), np.uint8)
    packed[:, 0] = user_bucket(user_ids)
    unsigned = np.ascontiguousarray(user_ids, np.int64).view(np.uint64) ^ np.uint64(_SIGN)
    packed[:, 1:] = unsigned.astype(">u8").view(np.uint8).reshape(-1, 8)
    flat = packed.tobytes()
    return [flat[start : start + PREFIX_BYTES] for start in range(0, len(flat), PREFIX_BYTES)]


def user_of_prefix(prefix: Buffer) -> int:
    """The user a key or a key prefix belongs to."""
    return int.from_bytes(prefix[1:PREFIX_BYTES], "big") - _SIGN


def key_suffix(timestamp_ms: int, event_key: int) -> bytes:
    """What follows the prefix in the key of a page whose first row has this identity."""
    return _SUFFIX.pack(timestamp_ms + _SIGN, event_key)


@dataclass(frozen=True)
class PageLayout:
    """Sizes and offsets of a namespace's pages."""

    row_dtype: np.dtype
    row_bytes: int
    rows_per_page: int
    _timestamp: struct.Struct
    _event_key: struct.Struct
    _timestamp_offset: int
    _event_key_offset: int

    @staticmethod
    def of(namespace: Namespace) -> PageLayout:
        """The layout of ``namespace``.

        A value that does not fit into half a page of the store occupies whole 4 KB pages with one
        header, so pages are cut just below a multiple of 4 KB: the smallest multiple that holds 64
        rows, between 8 and 32 KB, or one row where rows are larger than that.
        """
        dtype = namespace.row_dtype
        capacity = 0
        for units in range(_MIN_PAGE_UNITS, _MAX_PAGE_UNITS + 1):
            capacity = (units * _STORE_PAGE_BYTES - _STORE_HEADER_BYTES) // dtype.itemsize
            if capacity >= _TARGET_ROWS_PER_PAGE:
                break
        fields = dtype.fields
        assert fields is not None
        return PageLayout(
            row_dtype=dtype,
            row_bytes=dtype.itemsize,
            rows_per_page=max(1, capacity),
            _timestamp=struct.Struct("=q"),
            _event_key=struct.Struct("=Q"),
            _timestamp_offset=fields["timestamp_ms"][1],
            _event_key_offset=fields["event_key"][1],
        )

    def row_id(self, page: Buffer, index: int) -> RowId:
        """Identity of the row at ``index`` of ``page``."""
        start = index * self.row_bytes
        return (
            self._timestamp.unpack_from(page, start + self._timestamp_offset)[0],
            self._event_key.unpack_from(page, start + self._event_key_offset)[0],
        )

    def count(self, page: Buffer) -> int:
        """Number of rows in ``page``."""
        return len(page) // self.row_bytes

    def count_all(self, pages: Sequence[Buffer]) -> int:
        """Number of rows in ``pages``."""
        return sum(map(len, pages)) // self.row_bytes

    def position(self, page: Buffer, row_id: RowId) -> int:
        """Number of rows of ``page`` that sort before ``row_id``."""
        count = len(page) // self.row_bytes
        if count and self.row_id(page, count - 1) < row_id:  # appends and newest reads: no search
            return count
        return bisect_left(range(count), row_id, key=lambda index: self.row_id(page, index))

    def rows(self, data: Buffer) -> NDArray[np.void]:
        """``data`` as rows, not copied."""
        return np.frombuffer(data, self.row_dtype)

    def cut(self, head: Buffer, middle: Buffer, tail: Buffer) -> list[bytes]:
        """``head + middle + tail`` cut into pages.

        Appended rows (no tail) fill pages, since a user's next rows follow them; an insertion that
        overflows splits evenly, so that the next insertions find room.
        """
        content = b"".join((head, middle, tail))
        count = len(content) // self.row_bytes
        step = self.rows_per_page
        if len(tail):
            step = -(-count // -(-count // self.rows_per_page))
        stride = step * self.row_bytes
        if len(content) <= stride:
            return [content]
        return [content[start : start + stride] for start in range(0, len(content), stride)]
