"""Changes of a namespace, each inside one transaction of the index.

They put records and count what changed. What they take from and release to the allocator holds
only if the transaction commits, which is the caller's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.counters import NamespaceCounters
from cache_actors.store.extents import ExtentAllocator
from cache_actors.store.limits import StoreLimits
from cache_actors.store.lookup import ALL_ROWS
from cache_actors.store.records import (
    NO_WORDS,
    Flag,
    Record,
    RecordBatch,
    record_key,
    record_words,
    user_of_key,
)
from cache_actors.store.row_file import RowFile
from cache_actors.store.row_merge import SortedRows, opaque
from cache_actors.store.row_reads import copy_sound_runs, find_one
from cache_actors.store.row_writes import RowWriter
from cache_actors.store.store_scan import IndexScan
from cache_actors.store.write_effect import WriteEffect


@dataclass(frozen=True)
class NamespaceChanges:
    """Changes of one namespace.

    Attributes:
        index: LMDB table of records.
        facts: LMDB table of facts, with the counters under ``counters_key``.
        file: where the rows are.
        allocator: which places of it are free.
        limits: bounds of the shard.
        grow: makes the file larger by at least so many places, or raises.
    """

    index: Any
    facts: Any
    counters_key: bytes
    file: RowFile
    allocator: ExtentAllocator
    limits: StoreLimits
    grow: Callable[[int], None]

    def _writer(self) -> RowWriter:
        return RowWriter(self.file, self.allocator, self.limits.max_rows_per_user, self.grow)

    def record(self, transaction: Any, user_id: int) -> Record | None:
        """A user's record; None if it is absent or damaged."""
        value = transaction.get(record_key(user_id), None, self.index)
        return None if value is None else Record.unpack(value, user_id)

    def upsert(
        self, new: SortedRows, flags: int, newest_step: int, num_forgotten: int, transaction: Any
    ) -> None:
        """Save rows; ``flags`` are set on their users."""
        batch = RecordBatch.read(transaction, self.index, new.user_ids)
        now_s = int(time.time())
        expired = np.zeros(len(new.user_ids), np.bool_)
        if self.limits.ttl_s is not None:
            expired = ~batch.absent & (batch.written_s + int(self.limits.ttl_s) < now_s)
        effect = self._writer().upsert(batch, expired, new, now_s, flags)
        self._put(transaction, effect)
        counters = self._counters(transaction)
        counters.newest_step = max(counters.newest_step, newest_step)
        counters.forgotten_rows += num_forgotten
        counters.saves += 1
        self._put_counters(transaction, counters, effect)

    def restore(self, older: SortedRows, transaction: Any) -> None:
        """Add older rows; stored ones win."""
        batch = RecordBatch.read(transaction, self.index, older.user_ids)
        effect = self._writer().restore(batch, older, int(time.time()))
        self._put(transaction, effect)
        self._put_counters(transaction, self._counters(transaction), effect)

    def drop_rows(self, user_ids: NDArray[np.int64], transaction: Any) -> int:
        """Drop rows that others have; the number of users who had any."""
        effect, dropped, newly = WriteEffect([]), 0, 0
        for user_id in user_ids.tolist():
            record = self.record(transaction, user_id)
            if record is None or not record.extents:
                continue
            for extent in record.extents:
                self.allocator.release(extent)
            stub = Record(
                version=(record.version + 1) & 0xFFFFFFFF,
                written_s=record.written_s,
                evicted_rows=record.evicted_rows + record.num_rows,
                flags=Flag.EVICTED,
            )
            effect.items.append((record_key(user_id), stub.pack(user_id)))
            effect.rows_added -= record.num_rows
            newly += not record.flags & Flag.EVICTED
            dropped += 1
        effect.users_added -= dropped
        self._put(transaction, effect)
        counters = self._counters(transaction)
        counters.evictions += dropped
        counters.evicted_users += newly
        self._put_counters(transaction, counters, effect)
        return dropped

    def delete_keys(self, keys: list[bytes], transaction: Any) -> int:
        """Delete records with their rows; how many there were."""
        effect, deleted = WriteEffect([]), 0
        counters = self._counters(transaction)
        for key in keys:
            value = transaction.get(key, None, self.index)
            if value is None:
                continue
            record = Record.unpack(value, user_of_key(key))
            if record is not None:
                for extent in record.extents:
                    self.allocator.release(extent)
                effect.rows_added -= record.num_rows
                effect.users_added -= bool(record.extents)
                counters.evicted_users -= bool(record.flags & Flag.EVICTED)
            transaction.delete(key, db=self.index)
            deleted += 1
        self._put_counters(transaction, counters, effect)
        return deleted

    def forget(self, user_id: int, until_ms: int, transaction: Any) -> int:
        """Remove a user's rows up to a time; how many there were."""
        self.repair(np.array([user_id], np.int64), transaction)  # the rest is read unchecked
        value = transaction.get(record_key(user_id), None, self.index)
        record = None if value is None else Record.unpack(value, user_id)
        if record is None:
            return 0
        words = record_words(value, user_id) or NO_WORDS
        runs, count = find_one(words, user_id, ALL_ROWS, None, self.file, None)
        rows = np.empty(count, self.file.dtype)
        copy_sound_runs(runs, self.file, rows.view(np.uint64), user_id)
        kept = opaque(rows)[rows["timestamp_ms"] > until_ms].view(rows.dtype)
        num_forgotten = count - len(kept)
        if not len(kept):
            self.delete_keys([record_key(user_id)], transaction)
        elif num_forgotten or record.flags & Flag.EVICTED:
            whole = replace(record, flags=record.flags & ~Flag.EVICTED, evicted_rows=0)
            users, starts = np.array([user_id], np.int64), np.array([0, len(kept)], np.int64)
            effect = self._writer().replace_rows([whole], users, kept, starts)
            effect.evicted_users_removed = int(bool(record.flags & Flag.EVICTED))
            self._put(transaction, effect)
            self._put_counters(transaction, self._counters(transaction), effect)
        counters = self._counters(transaction)
        counters.forgotten_rows += num_forgotten
        self._put_counters(transaction, counters, WriteEffect([]))
        return num_forgotten

    def repair(self, user_ids: NDArray[np.int64], transaction: Any) -> int:
        """Drop damaged rows; how many there were."""
        batch = RecordBatch.read(transaction, self.index, user_ids)
        effect = self._writer().repair(batch, user_ids, int(time.time()))
        self._put(transaction, effect)
        self._put_counters(transaction, self._counters(transaction), effect)
        return effect.rows_damaged

    def _put(self, transaction: Any, effect: WriteEffect) -> None:
        effect.items.sort(key=itemgetter(0))  # neighbours in the index are written together
        transaction.cursor(self.index).putmulti(effect.items)

    def _counters(self, transaction: Any) -> NamespaceCounters:
        return NamespaceCounters.unpack(transaction.get(self.counters_key, None, self.facts))

    def _put_counters(
        self, transaction: Any, counters: NamespaceCounters, effect: WriteEffect
    ) -> None:
        counters.users += effect.users_added
        counters.rows += effect.rows_added
        counters.damaged_rows += effect.rows_damaged
        counters.evicted_users -= effect.evicted_users_removed
        counters.evicted_users += effect.evicted_users_added
        counters.places = self.file.places - self.allocator.unused_rows
        transaction.put(self.counters_key, counters.pack(), db=self.facts)

    def recount(self, found: IndexScan, transaction: Any) -> None:
        """Count again what a scan of the index found."""
        counters = self._counters(transaction)
        counters.users, counters.rows = found.num_users, found.num_rows
        counters.evicted_users = found.num_evicted
        self._put_counters(transaction, counters, WriteEffect([]))

    def count(self, transaction: Any, **added: int) -> None:
        """Add to counters."""
        counters = self._counters(transaction)
        for name, amount in added.items():
            setattr(counters, name, getattr(counters, name) + amount)
        transaction.put(self.counters_key, counters.pack(), db=self.facts)
