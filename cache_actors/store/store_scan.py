"""Reading a whole index once: what a writer has to know of a store that it opens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.lmdb_environment import LmdbEnvironment
from cache_actors.store.records import (
    CLASS_MASK,
    CLASS_SHIFT,
    COUNT_MASK,
    HEAD_WORDS,
    START_SHIFT,
    Flag,
    RecordBatch,
    users_of_keys,
)

_RECORDS_PER_STEP = 4096


@dataclass(frozen=True)
class IndexScan:
    """Columns of all records."""

    users: NDArray[np.int64]  # [U]
    written_s: NDArray[np.int64]  # [U]
    flags: NDArray[np.uint32]  # [U]
    num_extents: NDArray[np.int64]  # [U]
    extents: NDArray[np.int64]  # [E, 3], start, size class and rows
    damaged_keys: list[bytes]

    @property
    def places_end(self) -> int:
        """The end of the last extent in the row file."""
        if not len(self.extents):
            return 0
        return int((self.extents[:, 0] + (1 << self.extents[:, 1])).max())

    @property
    def num_users(self) -> int:
        """Users with rows."""
        return int((self.num_extents > 0).sum())

    @property
    def num_rows(self) -> int:
        """Rows of all users."""
        return int(self.extents[:, 2].sum())

    @property
    def num_evicted(self) -> int:
        """Users of whom rows are elsewhere."""
        return int(((self.flags & np.uint32(Flag.EVICTED)) != 0).sum())


def scan_index(env: LmdbEnvironment, index: Any) -> IndexScan:
    """Everything in ``index``, some thousand records per read transaction."""
    users, written, flags, num_extents, extents = [], [], [], [], []
    damaged: list[bytes] = []
    for keys, values in _pages(env, index):
        batch = RecordBatch.of(values, owners := users_of_keys(keys))
        damaged += [key for key, bad in zip(keys, batch.damaged.tolist(), strict=True) if bad]
        is_extent = np.ones(len(batch.words), np.bool_)
        is_extent[(batch.starts[:-1, None] + np.arange(HEAD_WORDS)).ravel()] = False
        words = batch.words[is_extent].astype(np.int64)
        size_class, count = (words >> CLASS_SHIFT) & CLASS_MASK, words & COUNT_MASK
        extents.append(np.stack([words >> START_SHIFT, size_class, count], axis=1))
        sound = ~batch.damaged
        users.append(owners[sound])
        written.append(batch.written_s[sound])
        flags.append(batch.flags[sound])
        num_extents.append(batch.num_extents[sound])
    if not users:
        none = np.empty(0, np.int64)
        no_extents = np.empty((0, 3), np.int64)
        return IndexScan(none, none, np.empty(0, np.uint32), none, no_extents, [])
    return IndexScan(
        np.concatenate(users),
        np.concatenate(written),
        np.concatenate(flags),
        np.concatenate(num_extents),
        np.concatenate(extents),
        damaged,
    )


def _pages(env: LmdbEnvironment, index: Any) -> Iterator[tuple[list[bytes], list[bytes]]]:
    after: bytes | None = None
    while True:
        items = env.read(partial(_items_after, index, after))
        if not items:
            return
        yield [key for key, _ in items], [value for _, value in items]
        after = items[-1][0]


def _items_after(index: Any, after: bytes | None, transaction: Any) -> list[tuple[bytes, bytes]]:
    cursor = transaction.cursor(index)
    found = cursor.first() if after is None else cursor.set_range(after + b"\0")
    items: list[tuple[bytes, bytes]] = []
    if found:
        for key, value in cursor.iternext():
            items.append((bytes(key), bytes(value)))
            if len(items) == _RECORDS_PER_STEP:
                break
    return items
