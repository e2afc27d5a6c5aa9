"""What readers must know of a namespace beside its records, as the writer stores it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from marm.addressing import NUM_BUCKETS

_TAIL = struct.Struct("<III")
_OWNED_BYTES = NUM_BUCKETS // 8


@dataclass(frozen=True)
class ReadRules:
    """Read with every lookup, in its transaction, so that a change takes effect at once.

    Attributes:
        owned: buckets that this shard owns, ``[256]``.
        max_rows_per_user: newest rows of a user that may be seen.
        ttl_s: age in seconds at which a user is no longer seen.
        file_number: which row file holds the rows; a dropped namespace gets a new one.
    """

    owned: NDArray[np.bool_]
    max_rows_per_user: int | None
    ttl_s: int | None
    file_number: int

    @cached_property
    def owns_all(self) -> bool:
        """Whether every bucket is owned."""
        return bool(self.owned.all())

    def pack(self) -> bytes:
        """The rules as stored."""
        tail = _TAIL.pack(self.max_rows_per_user or 0, self.ttl_s or 0, self.file_number)
        return np.packbits(self.owned).tobytes() + tail

    @staticmethod
    def unpack(data: bytes) -> ReadRules:
        """The rules in ``data``."""
        bits = np.frombuffer(data[:_OWNED_BYTES], np.uint8)
        max_rows, ttl_s, number = _TAIL.unpack_from(data, _OWNED_BYTES)
        return ReadRules(
            np.unpackbits(bits).astype(np.bool_), max_rows or None, ttl_s or None, number
        )
