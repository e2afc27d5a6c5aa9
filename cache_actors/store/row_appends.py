"""Appending rows behind what is stored of their users, for a whole batch of users at once.

Most rows are newer than everything stored of their user. They go into the free part of the user's
last extent; where that is too small, into an extent of the next fitting size, together with the
rows of the small one, or into one more extent where the last is as large as they get.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.extents import ExtentAllocator, class_for
from cache_actors.store.records import (
    CHECK,
    CLASS_MASK,
    CLASS_SHIFT,
    COUNT_MASK,
    START_SHIFT,
    WORD_BYTES,
    RecordBatch,
    record_keys,
)
from cache_actors.store.row_file import RowFile
from cache_actors.store.row_merge import SortedRows, expand_runs, opaque, repeats_previous
from cache_actors.store.write_effect import WriteEffect

_HALF = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class Tails:
    """The last extent of each user of a batch; all zeros where there is none."""

    start: NDArray[np.int64]
    count: NDArray[np.int64]
    capacity: NDArray[np.int64]

    @staticmethod
    def of(batch: RecordBatch) -> Tails:
        """The tails of a batch."""
        words = batch.words[batch.starts[1:] - 1]
        words = np.where(batch.num_extents > 0, words, np.uint64(0))
        size_class = (words >> np.uint64(CLASS_SHIFT)) & np.uint64(CLASS_MASK)
        capacity = np.int64(1) << size_class.astype(np.int64)
        return Tails(
            (words >> np.uint64(START_SHIFT)).astype(np.int64),
            (words & np.uint64(COUNT_MASK)).astype(np.int64),
            np.where(batch.num_extents > 0, capacity, 0),
        )


@dataclass(frozen=True)
class RowAppender:
    """Appends rows of one namespace. ``grow(places)`` makes the file larger or raises."""

    file: RowFile
    allocator: ExtentAllocator
    may_add_extents: bool  # not where a limit of rows per user may drop others for them
    grow: Callable[[int], None]

    def append(
        self,
        batch: RecordBatch,
        new: SortedRows,
        allowed: NDArray[np.bool_],
        now_s: int,
        flags: int,
        effect: WriteEffect,
    ) -> NDArray[np.bool_]:
        """Append what can be appended; which users that were, ``[U]``."""
        tails = Tails.of(batch)
        chunk = self.allocator.chunk_rows
        fits = new.counts <= tails.capacity - tails.count
        is_full = tails.count == chunk
        moved = np.where(fits | is_full, 0, tails.count)
        grows = ~fits & (moved + new.counts <= chunk)
        if not self.may_add_extents:
            grows &= moved > 0
        users = np.flatnonzero(allowed & _are_newer(batch, new) & (fits | grows))
        if len(users):
            self._append(batch, new, tails, users, fits[users], moved[users], now_s, flags, effect)
        appended = np.zeros(len(fits), np.bool_)
        appended[users] = True
        return appended

    def _append(
        self,
        batch: RecordBatch,
        new: SortedRows,
        tails: Tails,
        users: NDArray[np.int64],
        fits: NDArray[np.bool_],
        moved: NDArray[np.int64],
        now_s: int,
        flags: int,
        effect: WriteEffect,
    ) -> None:
        added = new.counts[users]
        extents = batch.words[batch.starts[users + 1] - 1] + added.astype(np.uint64)
        first = tails.start[users] + tails.count[users]  # place of the first new row
        grows = np.flatnonzero(~fits)
        if len(grows):
            is_long = batch.num_extents[users[grows]] - (moved[grows] > 0) > 1
            counts = moved[grows] + added[grows]
            fresh = self._take(counts, is_long)
            extents[grows] = fresh
            target = (fresh >> np.uint64(START_SHIFT)).astype(np.int64)
            self._move(tails.start[users[grows]], moved[grows], target)
            outgrown = batch.words[batch.starts[users[grows] + 1] - 1][moved[grows] > 0]
            for extent in outgrown.tolist():
                self.allocator.release(extent)
            first[grows] = target + moved[grows]
        rows = new.rows
        if len(users) < len(new.user_ids):
            rows = opaque(rows).take(expand_runs(new.starts[users], added)).view(rows.dtype)
        self.file.write(expand_runs(first, added), rows, np.repeat(new.user_ids[users], added))
        is_longer = ~fits & (moved == 0)
        self._put_records(batch, new, users, extents, is_longer, now_s, flags, effect)
        effect.rows_added += int(added.sum())
        effect.users_added += int((batch.num_extents[users] == 0).sum())

    def _take(self, counts: NDArray[np.int64], is_long: NDArray[np.bool_]) -> NDArray[np.uint64]:
        """Fresh extents with room for ``counts`` rows, which they count as theirs. A long history
        will grow soon, so it gets more room."""
        long_class = self.allocator.top - 1
        taken = []
        for count, needs_more in zip(counts.tolist(), is_long.tolist(), strict=True):
            size_class = max(class_for(count), long_class if needs_more else 0)
            extent = self.allocator.take(size_class)
            if extent is None:
                self.grow(self.allocator.chunk_rows)
                extent = self.allocator.take(size_class)
                assert extent is not None
            taken.append(extent + count)
        return np.array(taken, np.uint64)

    def _move(
        self, start: NDArray[np.int64], count: NDArray[np.int64], target: NDArray[np.int64]
    ) -> None:
        """Copy rows with their check words, so that damage moves along and is still seen."""
        source, places = expand_runs(start, count), expand_runs(target, count)
        mapped = self.file.mapped
        mapped.opaque[places] = mapped.opaque.take(source)
        mapped.checks[places] = mapped.checks.take(source)

    def _put_records(
        self,
        batch: RecordBatch,
        new: SortedRows,
        users: NDArray[np.int64],
        extents: NDArray[np.uint64],
        is_longer: NDArray[np.bool_],
        now_s: int,
        flags: int,
        effect: WriteEffect,
    ) -> None:
        """The users' records with ``extents`` as their last, in place of the last or behind it."""
        old_size = np.diff(batch.starts)[users]
        size = old_size + is_longer
        head = np.cumsum(size) - size
        words = np.zeros(int(size.sum()), np.uint64)
        words[expand_runs(head, old_size)] = batch.words[expand_runs(batch.starts[users], old_size)]
        last = new.starts[users + 1] - 1
        words[head + size - 1] = extents
        words[head + 1] = new.times[last].view(np.uint64)
        words[head + 2] = new.keys[last]
        version = (words[head + 3] + np.uint64(1)) & _HALF
        words[head + 3] = version | np.uint64(now_s << 32)
        words[head + 4] |= np.uint64(flags << 32)
        words[head] = 0
        user_ids = new.user_ids[users]
        words[head] = np.uint64(CHECK) + user_ids.view(np.uint64) - np.add.reduceat(words, head)
        data = words.view(np.uint8).data
        edges = (np.append(head, len(words)) * WORD_BYTES).tolist()
        values = [data[low:high] for low, high in pairwise(edges)]
        effect.items += zip(record_keys(user_ids), values, strict=True)


def _are_newer(batch: RecordBatch, new: SortedRows) -> NDArray[np.bool_]:
    """Users whose new rows are distinct, and newer than all stored ones."""
    first = new.starts[:-1]
    newer = new.times[first] > batch.newest_ms
    newer |= (new.times[first] == batch.newest_ms) & (new.keys[first] > batch.newest_key)
    repeats = repeats_previous(new.owner, new.rows)
    if repeats.any():
        newer &= np.bincount(new.owner[repeats], minlength=len(newer)) == 0
    return newer
