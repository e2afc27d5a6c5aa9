"""One user's rows of a namespace as a value that can leave the process.

    header  magic | version u16, header bytes u16 | rows u32, raw rows u32 |
            row bytes u32, 0 u32 | namespace digest u64 | user_id i64 |
            events digest u64 | checksum u64
    rows    as the namespace stores them, oldest first

All little-endian. The checksum covers everything else, so a block that was cut, changed, or stored
under another user's or namespace's key is never taken for rows. The digest of the events (their
times, keys and feedback) tells from the header alone whether other rows begin with the same ones.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from cache_actors.store.row_formats import decode, encode
from marm.memory import RAW_STEP, Namespace

MAGIC = b"MARM"
BLOCK_VERSION = 1

_UNCHECKED = struct.Struct("<4sHHIIIIQqQ")
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _UNCHECKED.size + _CHECKSUM.size


class DamagedBlockError(ValueError):
    """Bytes that are not an intact block of the user and namespace asked for."""


@dataclass(frozen=True)
class BlockHeader:
    """What the first bytes of a block say."""

    num_rows: int
    num_raw_rows: int
    row_bytes: int
    padding: int
    namespace_digest: int
    user_id: int
    events_digest: int
    checksum: int

    @staticmethod
    def unpack(data: bytes, namespace: Namespace, user_id: int) -> BlockHeader:
        """The header at the start of ``data``, which must be one of ``namespace`` and the user."""
        if data[:4] != MAGIC[: len(data)] or not data:
            raise DamagedBlockError(
                f"expected a block of rows ({MAGIC!r}), got bytes of something else: {data[:8]!r}"
            )
        if len(data) < HEADER_BYTES:
            raise DamagedBlockError(f"expected {HEADER_BYTES} bytes of header, got {len(data)}")
        _, version, header_bytes, *facts = _UNCHECKED.unpack_from(data)
        if (version, header_bytes) != (BLOCK_VERSION, HEADER_BYTES):
            raise DamagedBlockError(
                f"expected block version {BLOCK_VERSION} with {HEADER_BYTES} bytes of header, got "
                f"version {version} with {header_bytes}"
            )
        header = BlockHeader(*facts, *_CHECKSUM.unpack_from(data, _UNCHECKED.size))
        if header.namespace_digest != namespace_digest(namespace):
            raise DamagedBlockError(f"expected rows of {namespace.name}, got another namespace's")
        if header.user_id != user_id:
            raise DamagedBlockError(f"expected rows of user {user_id}, got {header.user_id}'s")
        if header.row_bytes != namespace.stored_dtype.itemsize:
            raise DamagedBlockError(
                f"expected rows of {namespace.stored_dtype.itemsize} bytes, got {header.row_bytes}"
            )
        return header

    def is_covered_by(self, rows: NDArray[np.void]) -> bool:
        """Whether ``rows`` hold all that the block holds, so that they may take its place.

        True only if an upsert of ``rows`` would leave just them: the block's events are their first
        ones, with the same feedback, and none is raw here that may be computed there.
        """
        if self.num_rows > len(rows):
            return False
        first = rows[: self.num_rows]
        if self.num_raw_rows != self.num_rows and _num_raw(first):
            return False
        return events_digest(first) == self.events_digest


def encode_block(namespace: Namespace, user_id: int, rows: NDArray[np.void]) -> bytes:
    """The block of one user's rows, which have the namespace's ``row_dtype``."""
    body = np.ascontiguousarray(encode(namespace, rows)).tobytes()
    unchecked = _UNCHECKED.pack(
        MAGIC,
        BLOCK_VERSION,
        HEADER_BYTES,
        len(rows),
        _num_raw(rows),
        namespace.stored_dtype.itemsize,
        0,
        namespace_digest(namespace),
        user_id,
        events_digest(rows),
    )
    return b"".join((unchecked, _CHECKSUM.pack(_checksum(unchecked, body)), body))


def decode_block(namespace: Namespace, user_id: int, block: bytes) -> NDArray[np.void]:
    """The rows in a block, in the namespace's ``row_dtype``. They may not be writable.

    Raises:
        DamagedBlockError: the block isn't an intact one of this user and namespace.
    """
    header = BlockHeader.unpack(block[:HEADER_BYTES], namespace, user_id)
    body = memoryview(block)[HEADER_BYTES:]
    if len(body) != header.num_rows * header.row_bytes:
        raise DamagedBlockError(
            f"expected {header.num_rows} rows of {header.row_bytes} bytes, got {len(body)} bytes"
        )
    if header.checksum != _checksum(block[: _UNCHECKED.size], body):
        raise DamagedBlockError(f"the checksum of user {user_id}'s rows is wrong")
    return decode(namespace, np.frombuffer(body, namespace.stored_dtype))


def events_digest(rows: NDArray[np.void]) -> int:
    """Digest of which events ``rows`` hold, in their order, and of their feedback, which an upsert
    merges."""
    events = np.empty((len(rows), 3), np.uint64)
    events[:, 0] = rows["timestamp_ms"].view(np.uint64)
    events[:, 1] = rows["event_key"]
    events[:, 2] = rows["feedback"]
    return xxhash.xxh3_64_intdigest(events.data)


def _num_raw(rows: NDArray[np.void]) -> int:
    return int(np.count_nonzero(rows["written_step"] == RAW_STEP))


def namespace_digest(namespace: Namespace) -> int:
    """Digest of a namespace's name, which determines all of it."""
    return xxhash.xxh3_64_intdigest(namespace.name.encode())


def _checksum(unchecked: bytes, body: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(body, seed=xxhash.xxh3_64_intdigest(unchecked))
