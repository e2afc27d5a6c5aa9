"""Upserting rows: what a batch of users' records become, and where their rows go.

Most rows are newer than everything stored of their user and are appended (`row_appends.py`). Where
rows arrive late or repeat an event, or are too many, the extents concerned are merged with them and
written to fresh places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.extents import ExtentAllocator, extent_counts, fresh_extents
from cache_actors.store.records import (
    COUNT_MASK,
    START_SHIFT,
    Flag,
    Record,
    RecordBatch,
    extent_count,
    extent_start,
    record_keys,
)
from cache_actors.store.row_appends import RowAppender
from cache_actors.store.row_file import PlaceRuns, RowFile, row_checks
from cache_actors.store.row_merge import SortedRows, opaque, upsert_runs
from cache_actors.store.write_effect import WriteEffect


@dataclass(frozen=True)
class Rewrite:
    """A user whose extents ``low..high`` are replaced."""

    index: int  # of the user in the batch
    record: Record
    low: int
    high: int

    def split(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The extents before, within and after the region."""
        extents = self.record.extents
        if self.high < 0:  # an expired user: nothing stays
            return (), extents, ()
        return extents[: self.low], extents[self.low : self.high], extents[self.high :]


@dataclass(frozen=True)
class RowWriter:
    """Writes rows of one namespace. ``grow(places)`` makes the file larger or raises."""

    file: RowFile
    allocator: ExtentAllocator
    max_rows_per_user: int | None
    grow: Callable[[int], None]

    def upsert(
        self,
        batch: RecordBatch,
        expired: NDArray[np.bool_],
        new: SortedRows,
        now_s: int,
        flags: int,
    ) -> WriteEffect:
        """Save ``new`` to the users of ``batch``; ``flags`` are set on each."""
        effect = WriteEffect([])
        was_evicted = (batch.flags & np.uint32(Flag.EVICTED)) != 0
        effect.evicted_users_removed += int((expired & was_evicted).sum())
        appender = RowAppender(self.file, self.allocator, self.max_rows_per_user is None, self.grow)
        allowed = ~expired & ~batch.damaged
        appended = appender.append(batch, new, allowed, now_s, flags, effect)
        others = np.flatnonzero(~appended)
        if len(others):
            mask = np.repeat(~appended, new.counts)
            position = np.full(len(appended), -1)
            position[others] = np.arange(len(others))
            rewrites = [self._region(batch, expired, new, index) for index in others.tolist()]
            old, old_run = self._stored(rewrites, new.user_ids, effect)
            run = position[new.owner[mask]]
            merged = upsert_runs(
                len(others), old, old_run, opaque(new.rows)[mask].view(new.rows.dtype), run
            )
            self._write_rewrites(
                rewrites, new.user_ids, merged.rows, merged.starts, now_s, flags, effect
            )
        return effect

    def restore(self, batch: RecordBatch, older: SortedRows, now_s: int) -> WriteEffect:
        """Add rows that a durable tier kept: what is stored here wins, and nothing is missing
        afterwards."""
        effect = WriteEffect([])
        rewrites = []
        for index in range(len(older.user_ids)):
            record = batch.record(index) or Record(written_s=now_s)
            effect.evicted_users_removed += bool(record.flags & Flag.EVICTED)
            record = replace(record, flags=record.flags & ~Flag.EVICTED, evicted_rows=0)
            rewrites.append(Rewrite(index, record, 0, len(record.extents)))
        stored, stored_run = self._stored(rewrites, older.user_ids, effect)
        merged = upsert_runs(len(rewrites), older.rows, older.owner, stored, stored_run)
        self._write_rewrites(rewrites, older.user_ids, merged.rows, merged.starts, None, 0, effect)
        return effect

    def repair(self, batch: RecordBatch, user_ids: NDArray[np.int64], now_s: int) -> WriteEffect:
        """Drop rows that fail their check, and records that do; their users are incomplete."""
        effect = WriteEffect([])
        rewrites = []
        for index, user_id in enumerate(user_ids.tolist()):
            record = batch.record(index)
            if batch.damaged[index]:
                stub = Record(written_s=now_s, flags=Flag.EVICTED)
                effect.items += zip(
                    record_keys(user_ids[index : index + 1]), [stub.pack(user_id)], strict=True
                )
                effect.evicted_users_added += 1
            elif record is not None:
                rewrites.append(Rewrite(index, record, 0, len(record.extents)))
        rows, run = self._stored(rewrites, user_ids, effect)
        broken = sorted(effect.incomplete)
        kept = np.isin(run, broken)
        starts = np.searchsorted(run[kept], [*broken, len(rewrites)])
        effect.incomplete = set(range(len(broken)))
        self._write_rewrites(
            [rewrites[index] for index in broken],
            user_ids,
            opaque(rows)[kept].view(rows.dtype),
            starts,
            None,
            0,
            effect,
        )
        return effect

    def replace_rows(
        self,
        records: Sequence[Record],
        user_ids: NDArray[np.int64],
        rows: NDArray[np.void],
        starts: NDArray[np.int64],
    ) -> WriteEffect:
        """Give users exactly these rows."""
        effect = WriteEffect([])
        rewrites = [Rewrite(i, r, 0, len(r.extents)) for i, r in enumerate(records)]
        self._write_rewrites(rewrites, user_ids, rows, starts, None, 0, effect)
        return effect

    def _region(
        self, batch: RecordBatch, expired: NDArray[np.bool_], new: SortedRows, index: int
    ) -> Rewrite:
        """Which extents of a user the new rows fall into."""
        record = batch.record(index)
        if record is None:
            lost = Flag.EVICTED if batch.damaged[index] else 0
            return Rewrite(index, Record(flags=lost), 0, 0)
        if expired[index]:
            return Rewrite(index, replace(record, newest_ms=0, newest_key=0, flags=0), 0, -1)
        extents = record.extents
        first, last = new.starts[index], new.starts[index + 1] - 1
        times, keys = new.rows["timestamp_ms"], new.rows["event_key"]
        oldest = int(times[first]), int(keys[first])
        newest = int(times[last]), int(keys[last])
        end = len(extents)
        if oldest > (record.newest_ms, record.newest_key):
            tail_is_full = not extents or extent_count(extents[-1]) == self.allocator.chunk_rows
            return Rewrite(index, record, end if tail_is_full else end - 1, end)
        firsts = self._first_ids(extents, int(new.user_ids[index]))
        if firsts is None:  # where rows belong can't be told: go through all, drop damaged ones
            return Rewrite(index, record, 0, end)
        low = max(0, sum(start <= oldest for start in firsts) - 1)
        high = max(low + 1, sum(start <= newest for start in firsts))
        return Rewrite(index, record, min(low, end), min(high, end))

    def _first_ids(self, extents: Sequence[int], user_id: int) -> Sequence[tuple[int, int]] | None:
        """Time and key of the first row of each extent; None if one of them is damaged."""
        starts = np.array(list(map(extent_start, extents)), np.int64)
        mapped = self.file.mapped
        expected = row_checks(mapped.words[starts], np.array([user_id], np.int64))
        if (mapped.checks[starts] != expected).any():
            return None
        return list(zip(mapped.times[starts].tolist(), mapped.keys[starts].tolist(), strict=True))

    def _stored(
        self, rewrites: Sequence[Rewrite], user_ids: NDArray[np.int64], effect: WriteEffect
    ) -> tuple[NDArray[np.void], NDArray[np.int64]]:
        """The sound rows in the regions, and the position of each one's rewrite."""
        spans = [
            (extent_start(extent), extent_count(extent), run)
            for run, rewrite in enumerate(rewrites)
            for extent in rewrite.record.extents[rewrite.low : max(rewrite.high, 0)]
        ]
        start, count, run = np.array(spans, np.int64).reshape(-1, 3).T
        places = PlaceRuns(start, count, np.ones(len(start), np.bool_))
        runs = np.repeat(run, count)
        mapped = self.file.mapped
        rows = mapped.opaque.take(places.places)
        words = rows.view(np.uint64).reshape(len(rows), self.file.row_words)
        owner = user_ids[np.array([rewrite.index for rewrite in rewrites], np.int64)[runs]]
        sound = row_checks(words, owner) == mapped.checks_of(places)
        if not sound.all():
            effect.rows_damaged += int((~sound).sum())
            effect.incomplete.update(np.unique(runs[~sound]).tolist())
            rows, runs = rows[sound], runs[sound]
        return rows.view(self.file.dtype), runs

    def _write_rewrites(
        self,
        rewrites: Sequence[Rewrite],
        user_ids: NDArray[np.int64],
        rows: NDArray[np.void],
        starts: NDArray[np.int64],
        written_s: int | None,
        flags: int,
        effect: WriteEffect,
    ) -> None:
        """Write merged rows to fresh places, and the records that name them. Users keep the time
        at which they were last written where ``written_s`` is None."""
        placed: list[int] = []
        edges = starts.tolist()
        last_ms = rows["timestamp_ms"][starts[1:] - 1].tolist() if len(rows) else []
        last_key = rows["event_key"][starts[1:] - 1].tolist() if len(rows) else []
        owners = user_ids[np.array([rewrite.index for rewrite in rewrites], np.int64)]
        keys = record_keys(owners)
        for run, rewrite in enumerate(rewrites):
            record, count = rewrite.record, edges[run + 1] - edges[run]
            kept_head, replaced, kept_tail = rewrite.split()
            is_long = len(kept_head) > 1 or count >= self.allocator.chunk_rows
            fresh = self._place(count, is_long and not kept_tail)
            placed += fresh
            for extent in replaced:
                self.allocator.release(extent)
            kept = self._within_limit((*kept_head, *fresh, *kept_tail))
            newest_ms, newest_key = record.newest_ms, record.newest_key
            if count and not kept_tail:
                newest_ms, newest_key = last_ms[run], last_key[run]
            lost = Flag.EVICTED if run in effect.incomplete else 0
            changed = Record(
                newest_ms,
                newest_key,
                (record.version + 1) & 0xFFFFFFFF,
                record.written_s if written_s is None else written_s,
                record.evicted_rows,
                record.flags | flags | lost,
                kept,
            )
            effect.items.append((keys[run], changed.pack(int(owners[run]))))
            effect.evicted_users_added += bool(changed.flags & ~record.flags & Flag.EVICTED)
            effect.users_added += bool(kept) - bool(record.extents)
            effect.rows_added += changed.num_rows - record.num_rows
        if placed:
            extents = np.array(placed, np.uint64)
            start = (extents >> np.uint64(START_SHIFT)).astype(np.int64)
            count = (extents & np.uint64(COUNT_MASK)).astype(np.int64)
            runs = PlaceRuns(start, count, np.ones(len(start), np.bool_))
            self.file.write(runs, rows, np.repeat(owners, np.diff(starts)))

    def _place(self, count: int, will_grow: bool) -> list[int]:
        """Fresh extents for ``count`` rows, with room behind them where more will come soon."""
        sizes, _ = extent_counts(np.array([count]), self.allocator.chunk_rows)
        needs_more = [False] * len(sizes)
        needs_more[-1:] = [will_grow] * len(needs_more[-1:])
        return fresh_extents(self.allocator, self.grow, sizes.tolist(), needs_more)

    def _within_limit(self, extents: tuple[int, ...]) -> tuple[int, ...]:
        """Drop the oldest extents that lie wholly beyond the limit of rows; readers hide the
        rest."""
        if self.max_rows_per_user is None:
            return extents
        total, dropped = sum(map(extent_count, extents)), 0
        while (
            dropped < len(extents) - 1
            and total - extent_count(extents[dropped]) >= self.max_rows_per_user
        ):
            total -= extent_count(extents[dropped])
            self.allocator.release(extents[dropped])
            dropped += 1
        return extents[dropped:]
