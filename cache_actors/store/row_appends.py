"""Appending rows behind what is stored of their users, for a whole batch of users at once.

Most rows are newer than everything stored of their user. They go into the free part of the user's
last extent; where that is too small, into fresh ones, together with the rows of the last unless
that is as large as extents get.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.extents import ExtentAllocator, extent_counts, fresh_extents
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
from cache_actors.store.row_file import PlaceRuns, RowFile
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
        moved = np.where(fits | (tails.count == chunk), 0, tails.count)
        may = allowed & _are_newer(batch, new)
        if not self.may_add_extents:
            may &= fits | ((moved > 0) & (moved + new.counts <= chunk))
        in_place, grown = np.flatnonzero(may & fits), np.flatnonzero(may & ~fits)
        if len(in_place):
            added = new.counts[in_place]
            first = tails.start[in_place] + tails.count[in_place]
            extents = batch.words[batch.starts[in_place + 1] - 1] + added.astype(np.uint64)
            one = np.ones(len(in_place), np.int64)
            self._write(new, in_place, PlaceRuns(first, added, tails.count[in_place] == 0))
            self._put_records(batch, new, in_place, one, extents, one, now_s, flags, effect)
        if len(grown):
            self._grow_tails(batch, new, tails, grown, moved[grown], now_s, flags, effect)
        for users in (in_place, grown):
            effect.rows_added += int(new.counts[users].sum())
            effect.users_added += int((batch.num_extents[users] == 0).sum())
        appended = np.zeros(len(fits), np.bool_)
        appended[in_place] = appended[grown] = True
        return appended

    def _grow_tails(
        self,
        batch: RecordBatch,
        new: SortedRows,
        tails: Tails,
        users: NDArray[np.int64],
        moved: NDArray[np.int64],
        now_s: int,
        flags: int,
        effect: WriteEffect,
    ) -> None:
        """Give users fresh extents for ``moved`` rows of their last one and for their new rows."""
        chunk = self.allocator.chunk_rows
        added = new.counts[users]
        total = moved + added
        counts, num_extents = extent_counts(total, chunk)
        needs_more = np.zeros(len(counts), np.bool_)
        needs_more[np.cumsum(num_extents) - 1] = batch.num_extents[users] + num_extents > 2
        fresh = fresh_extents(self.allocator, self.grow, counts.tolist(), needs_more.tolist())
        extents = np.array(fresh, np.uint64)
        start = (extents >> np.uint64(START_SHIFT)).astype(np.int64)
        kept = np.zeros(len(start), np.int64)  # rows of an extent that are there already
        kept[np.cumsum(num_extents) - num_extents] = moved  # always fewer than the first has
        self._move(tails.start[users], moved, expand_runs(start, kept))
        self._write(new, users, PlaceRuns(start + kept, counts - kept, kept == 0))
        is_outgrown = moved > 0
        for extent in batch.words[batch.starts[users + 1] - 1][is_outgrown].tolist():
            self.allocator.release(extent)
        dropped = is_outgrown.astype(np.int64)
        self._put_records(batch, new, users, dropped, extents, num_extents, now_s, flags, effect)

    def _write(self, new: SortedRows, users: NDArray[np.int64], runs: PlaceRuns) -> None:
        """Put the new rows of users into the places of runs."""
        counts, rows = new.counts[users], new.rows
        if len(users) < len(new.user_ids):
            rows = opaque(rows).take(expand_runs(new.starts[users], counts)).view(rows.dtype)
        self.file.write(runs, rows, np.repeat(new.user_ids[users], counts))

    def _move(
        self, start: NDArray[np.int64], count: NDArray[np.int64], places: NDArray[np.int64]
    ) -> None:
        """Copy the rows of whole extents with their check words, so that damage moves along and is
        still seen."""
        if len(places):
            source = expand_runs(start, count)
            mapped = self.file.mapped
            mapped.opaque[places] = mapped.opaque.take(source)
            mapped.checks[places] = mapped.checks.take(source)

    def _put_records(
        self,
        batch: RecordBatch,
        new: SortedRows,
        users: NDArray[np.int64],
        dropped: NDArray[np.int64],
        extents: NDArray[np.uint64],
        num_extents: NDArray[np.int64],
        now_s: int,
        flags: int,
        effect: WriteEffect,
    ) -> None:
        """The users' records without the last ``dropped`` extents, and with ``num_extents`` of
        ``extents`` instead."""
        kept = np.diff(batch.starts)[users] - dropped
        size = kept + num_extents
        head = np.cumsum(size) - size
        words = np.empty(int(size.sum()), np.uint64)
        words[expand_runs(head, kept)] = batch.words[expand_runs(batch.starts[users], kept)]
        words[expand_runs(head + kept, num_extents)] = extents
        last = new.starts[users + 1] - 1
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
