"""Blocks of rows: what was encoded comes back, and nothing else does."""

from __future__ import annotations

import numpy as np
import pytest
from tier_rows import user_rows

from cache_actors.store.row_formats import as_read
from cache_actors.tiers.user_block import (
    HEADER_BYTES,
    BlockHeader,
    DamagedBlockError,
    decode_block,
    encode_block,
)
from marm.memory import Namespace

NAMESPACES = [
    Namespace(depth=depth, dim=8, dtype=dtype)
    for depth in (0, 1, 3)
    for dtype in ("float16", "float32", "int8")
]


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda namespace: namespace.name)
@pytest.mark.parametrize("num_rows", [0, 1, 40])
def test_a_block_comes_back(namespace: Namespace, num_rows: int) -> None:
    rows = user_rows(namespace, [-5], num_rows).rows
    block = encode_block(namespace, -5, rows)
    assert len(block) == HEADER_BYTES + num_rows * namespace.stored_dtype.itemsize
    assert decode_block(namespace, -5, block).tobytes() == as_read(namespace, rows).tobytes()


def test_encoding_what_was_decoded_gives_the_same_block() -> None:
    namespace = Namespace(depth=2, dim=8, dtype="int8")
    block = encode_block(namespace, 1, user_rows(namespace, [1], 20).rows)
    assert encode_block(namespace, 1, decode_block(namespace, 1, block)) == block


def test_every_changed_byte_is_noticed() -> None:
    namespace = Namespace(depth=1, dim=4)
    block = encode_block(namespace, 3, user_rows(namespace, [3], 2).rows)
    for position in range(len(block)):
        for change in (0x01, 0x80):
            damaged = bytearray(block)
            damaged[position] ^= change
            with pytest.raises(DamagedBlockError):
                decode_block(namespace, 3, bytes(damaged))


def test_a_block_that_was_cut_or_extended_is_noticed() -> None:
    namespace = Namespace(depth=1, dim=4)
    block = encode_block(namespace, 3, user_rows(namespace, [3], 2).rows)
    for length in range(len(block)):
        with pytest.raises(DamagedBlockError):
            decode_block(namespace, 3, block[:length])
    with pytest.raises(DamagedBlockError):
        decode_block(namespace, 3, block + b"\0")


def test_another_users_or_namespaces_block_is_refused() -> None:
    namespace = Namespace(depth=1, dim=4)
    block = encode_block(namespace, 3, user_rows(namespace, [3], 2).rows)
    with pytest.raises(DamagedBlockError, match="expected rows of user 4"):
        decode_block(namespace, 4, block)
    with pytest.raises(DamagedBlockError, match="another namespace"):
        decode_block(Namespace(depth=1, dim=4, epoch=1), 3, block)


@pytest.mark.parametrize("foreign", [b"\0" * 200, b"hello", b"\x80\x04K\x01.", b"{}"])
def test_foreign_bytes_are_named(foreign: bytes) -> None:
    with pytest.raises(DamagedBlockError, match="something else"):
        decode_block(Namespace(), 1, foreign)


def test_rows_of_another_layout_are_not_encoded() -> None:
    rows = user_rows(Namespace(dim=8), [1]).rows
    with pytest.raises(ValueError, match="rows to store"):
        encode_block(Namespace(dim=16), 1, rows)


@pytest.mark.parametrize(
    ("stored", "rows", "is_covered"),
    [
        ((0, 5, 7), (0, 5, 7), True),
        ((0, 5, 7), (0, 9, 7), True),
        ((0, 5, 7), (0, 4, 7), False),
        ((0, 5, 7), (1, 9, 7), False),
        ((0, 5, -1), (0, 9, 7), True),
        ((0, 5, -1), (0, 9, -1), True),
        ((0, 5, 7), (0, 9, -1), False),
        ((0, 0, 7), (3, 2, -1), True),
    ],
)
def test_a_header_tells_whether_rows_hold_all_of_the_block(
    stored: tuple[int, int, int], rows: tuple[int, int, int], is_covered: bool
) -> None:
    namespace = Namespace(depth=1, dim=4)

    def run(first: int, count: int, step: int) -> np.ndarray:
        return user_rows(namespace, [1], count, first, step).rows

    block = encode_block(namespace, 1, run(*stored))
    header = BlockHeader.unpack(block[:HEADER_BYTES], namespace, 1)
    assert header.is_covered_by(run(*rows)) == is_covered
