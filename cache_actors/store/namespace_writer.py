"""One namespace of a shard, as its one writer sees it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.counters import NamespaceCounters
from cache_actors.store.errors import MemoryFullError, MemoryStoreError
from cache_actors.store.extents import ExtentAllocator, top_class
from cache_actors.store.limits import StoreLimits
from cache_actors.store.lmdb_environment import LmdbEnvironment
from cache_actors.store.lookup import ALL_ROWS
from cache_actors.store.namespace_changes import NamespaceChanges
from cache_actors.store.namespace_store import NamespaceStore
from cache_actors.store.recency import Recency
from cache_actors.store.records import (
    Flag,
    RecordBatch,
    record_key,
    record_keys,
    users_of_keys,
)
from cache_actors.store.row_checks import check_rows
from cache_actors.store.row_formats import encode
from cache_actors.store.row_merge import SortedRows
from cache_actors.store.store_scan import scan_index
from marm.addressing import user_bucket
from marm.memory import DoneAck, Namespace, UserRows

_SAVES_PER_READER_CHECK = 256
_READER_PATIENCE_S = 5.0
_EVICT_SHARE = 16
_USERS_PER_EVICTION = 64


class BudgetError(MemoryFullError):
    """The row file may not grow: users have to be evicted first."""


class ShardRules(Protocol):
    """What a namespace asks of its shard."""

    limits: StoreLimits
    track_unsaved: bool
    forgotten_until: dict[int, int]
    evict_to: Callable[[Namespace, UserRows], None] | None

    def owned(self) -> NDArray[np.bool_]:
        """Buckets that the shard owns."""
        ...

    def room_bytes(self, namespace: Namespace) -> int | None:
        """Bytes by which the files of a namespace may grow; None without bound."""
        ...

    def before_commit(self) -> None:
        """Called after rows were written and before the index names them."""
        ...


@dataclass(frozen=True)
class Unsaved:
    """Users whose newest change the durable tier does not have yet."""

    rows: UserRows
    versions: NDArray[np.uint32]


class BucketMovedError(MemoryStoreError):
    """Rows were sent to a shard that does not own their bucket (any more)."""


class NamespaceWriter(NamespaceStore):
    """Reads and writes of one namespace. Writes must not run at the same time: the shard sees to
    that."""

    def __init__(
        self, env: LmdbEnvironment, directory: Path, namespace: Namespace, shard: ShardRules
    ) -> None:
        super().__init__(env, directory, namespace)
        self._shard = shard
        self._num_saves = 0
        self.open_file_anew()
        self._file.unlink_others(namespace.name)

    def open_file_anew(self) -> None:
        """Find out from the index what is used and what is free."""
        self._env.read(self._rules)
        self.allocator = ExtentAllocator(top_class(self._file.row_bytes))
        found = scan_index(self._env, self._index)
        self._file.at_least(found.places_end)
        last = self._env.env.info()["last_txnid"]
        self._file.keep_reserved(found.places_end, self.allocator.chunk_rows)
        self.allocator.rest_all_but(found.extents, self._file.places, last)
        self.recency = Recency(found.users[np.argsort(found.written_s, kind="stable")].tolist())
        self._changes = NamespaceChanges(
            self._index,
            self._facts,
            self._counters_key,
            self._file,
            self.allocator,
            self._shard.limits,
            self._grow,
        )
        unsaved = (found.flags & Flag.UNSAVED) != 0
        self._unsaved = dict.fromkeys(found.users[unsaved].tolist())
        if found.damaged_keys:  # what they counted is not known any more
            self._commit(partial(self._changes.recount, found))
            self.repair(users_of_keys(found.damaged_keys))

    def save(self, user_ids: NDArray[np.int64], rows: NDArray[np.void]) -> DoneAck:
        """See `marm.memory.Memory.save`: one transaction, committed when this returns.

        Raises:
            BucketMovedError: the shard does not own the bucket of a user.
            MemoryFullError: there is no room, and evicting made none.
            ValueError: rows are not finite, or not one per user id.
        """
        user_ids = np.ascontiguousarray(user_ids, np.int64)
        check_rows(self._namespace, user_ids, rows)
        self._check_owned(user_ids)
        kept = self._not_forgotten(user_ids, rows)
        num_forgotten = len(rows) - int(kept.sum())
        if num_forgotten:
            user_ids, rows = user_ids[kept], rows[kept]
        if not len(rows):
            if num_forgotten:
                self._commit(lambda t: self._changes.count(t, forgotten_rows=num_forgotten))
            return DoneAck()
        new = SortedRows.of(user_ids, encode(self._namespace, rows))
        newest_step = int(rows["written_step"].max())
        flags = Flag.UNSAVED if self._shard.track_unsaved else 0
        change = partial(self._changes.upsert, new, flags, newest_step, num_forgotten)
        self._with_room(change, new.counts)
        users = new.user_ids.tolist()
        if self._shard.limits.evicts:
            self.recency.add(users)
        if flags:
            self._unsaved.update(dict.fromkeys(users))
        self._num_saves += 1
        if self._num_saves % _SAVES_PER_READER_CHECK == 0:
            self._env.forget_dead_readers()
        return DoneAck()

    def restore(self, rows: UserRows) -> None:
        """Add rows that the durable tier, a snapshot or another replica has. Where an event is
        stored here too, what is stored here wins; afterwards nothing of these users is missing."""
        user_ids = np.repeat(rows.user_ids, rows.counts)
        check_rows(self._namespace, user_ids, rows.rows)
        self._check_owned(rows.user_ids)
        kept = self._not_forgotten(user_ids, rows.rows)
        user_ids, kept_rows = user_ids[kept], rows.rows[kept]
        if not len(kept_rows):
            return
        older = SortedRows.of(user_ids, encode(self._namespace, kept_rows))
        self._with_room(partial(self._changes.restore, older), older.counts)
        self.recency.add(older.user_ids.tolist())

    def unsaved(self, max_users: int) -> Unsaved:
        """Some users whose newest change the durable tier does not have, longest waiting first."""
        users = np.array(list(self._unsaved)[:max_users], np.int64)
        # The versions are read first: a change in between makes `mark_saved` leave the user alone.
        versions = self._env.read(lambda t: RecordBatch.read(t, self._index, users).version)
        return Unsaved(self.fetch(users, ALL_ROWS), versions)

    @property
    def num_unsaved(self) -> int:
        """Users whose newest change the durable tier does not have."""
        return len(self._unsaved)

    def mark_saved(self, user_ids: NDArray[np.int64], versions: NDArray[np.uint32]) -> None:
        """The durable tier has these users as of these versions."""
        user_ids = np.ascontiguousarray(user_ids, np.int64)

        def change(transaction: Any) -> list[int]:
            saved = []
            for user_id, version in zip(user_ids.tolist(), versions.tolist(), strict=True):
                record = self._changes.record(transaction, user_id)
                if record is None or record.version == version:
                    saved.append(user_id)
                if record is not None and record.version == version:
                    changed = replace(record, flags=record.flags & ~Flag.UNSAVED)
                    transaction.put(record_key(user_id), changed.pack(user_id), db=self._index)
            return saved

        saved = set(self._commit(change))
        for user_id in user_ids.tolist():
            # One that changed meanwhile waits behind the others, or busy users would block them.
            if self._unsaved.pop(user_id, 0) is None and user_id not in saved:
                self._unsaved[user_id] = None

    def evict(self, user_ids: NDArray[np.int64]) -> int:
        """Drop the rows of users, so that the durable tier or the log must be asked; the number of
        users that had any."""
        user_ids = np.ascontiguousarray(user_ids, np.int64)
        evicted = self._commit(partial(self._changes.drop_rows, user_ids))
        self.recency.remove(user_ids.tolist())
        for user_id in user_ids.tolist():
            self._unsaved.pop(user_id, None)
        return evicted

    def remove(self, user_ids: NDArray[np.int64]) -> int:
        """Remove users without a trace; how many there were."""
        user_ids = np.ascontiguousarray(user_ids, np.int64)
        removed = self._commit(partial(self._changes.delete_keys, record_keys(user_ids)))
        self.recency.remove(user_ids.tolist())
        for user_id in user_ids.tolist():
            self._unsaved.pop(user_id, None)
        return removed

    def forget(self, user_id: int, until_ms: int) -> int:
        """Remove a user's rows up to a time; how many there were. Nothing counts as missing."""
        dropped: int = self._commit(partial(self._changes.forget, user_id, until_ms))
        if self._env.read(lambda t: self._changes.record(t, user_id)) is None:
            self.recency.remove([user_id])
            self._unsaved.pop(user_id, None)
        return dropped

    def repair(self, user_ids: NDArray[np.int64]) -> int:
        """Drop damaged rows of users, who count as evicted then; the number of rows dropped."""
        user_ids = np.unique(np.ascontiguousarray(user_ids, np.int64))
        dropped: int = self._commit(partial(self._changes.repair, user_ids))
        return dropped

    def expire(self, now_s: int) -> int:
        """Remove users to whom nothing was written within the time to live; how many."""
        if self._shard.limits.ttl_s is None:
            return 0
        found = scan_index(self._env, self._index)
        old = found.users[found.written_s + int(self._shard.limits.ttl_s) < now_s]
        removed = 0
        for start in range(0, len(old), 1024):
            removed += self.remove(old[start : start + 1024])
        if removed:
            self._commit(lambda t: self._changes.count(t, expired=removed))
        return removed

    def drop(self) -> None:
        """Delete all rows and records; the namespace starts again with new files."""
        old = self._file
        rules = replace(self._known[1], file_number=self.file_number + 1)
        self._open_file(rules).close()  # readers look for it as soon as the rules name it

        def change(transaction: Any) -> None:
            transaction.drop(self._index, delete=False)
            transaction.put(self._rules_key, rules.pack(), db=self._facts)
            transaction.put(self._counters_key, NamespaceCounters().pack(), db=self._facts)

        self._env.write(change)
        self.open_file_anew()
        old.unlink()

    def flush(self) -> None:
        """Write the rows through to the disk."""
        self._file.flush()

    def _with_room(self, change: Callable[[Any], None], counts: NDArray[np.int64]) -> None:
        """Commit a change; evict cold users as long as it does not fit."""
        needed = max(
            int((2 * counts + 2).sum()) + self.allocator.chunk_rows,
            self._file.places // _EVICT_SHARE,
        )
        while True:
            try:
                self._commit(change)
                return
            except BudgetError:
                self._check_can_fit(int(counts.sum()))
                self._await_readers()
                self._evict_coldest(self.allocator.free_rows + needed)
                self._await_readers()
                needed *= 2  # free places may be too scattered for what has to fit

    def _check_can_fit(self, rows: int) -> None:
        """Nobody is evicted for rows that do not fit into an empty store either."""
        room = self._shard.room_bytes(self._namespace) or 0
        most = self._file.places + room // (self._file.row_bytes + 8)
        if rows > most:
            raise MemoryFullError(
                f"{rows} rows of {self._namespace.name} are more than the {most} that fit into the "
                f"byte budget of {self._directory}; nothing of this batch was stored. Save fewer "
                "rows at a time, or raise the budget"
            )

    def _await_readers(self) -> None:
        """Return when no reader sees places that were freed."""
        deadline = time.monotonic() + _READER_PATIENCE_S
        while self.allocator.has_resting:
            self._env.forget_dead_readers()
            self.allocator.wake(self._env.oldest_reader())
            if time.monotonic() >= deadline:
                raise MemoryFullError(
                    f"{self._directory} has no room for rows of {self._namespace.name}: a reader "
                    f"held freed rows for {_READER_PATIENCE_S:.0f} s; nothing of this batch was "
                    "stored. Raise the byte budget or save fewer rows at a time"
                )
            time.sleep(0.0005)

    def _evict_coldest(self, places: int) -> None:
        """Evict until ``places`` are free or about to be."""
        while self.allocator.free_rows + self.allocator.resting_rows < places:
            users = np.array(self.recency.coldest(_USERS_PER_EVICTION), np.int64)
            if not len(users):
                raise MemoryFullError(
                    f"{self._directory} has no room for rows of {self._namespace.name} within its "
                    "byte budget, and nothing is left to evict; nothing of this batch was stored. "
                    "Raise the budget, set quotas, drop another namespace, or save fewer rows at a "
                    "time"
                )
            self.evict(self._taken_by_tier(users))

    def evict_some(self, count: int) -> int:
        """Evict the users unused for longest; how many that were."""
        users = np.array(self.recency.coldest(count), np.int64)
        return self.evict(self._taken_by_tier(users)) if len(users) else 0

    def drop_evicted_records(self) -> int:
        """Forget which users were evicted, for the room that the knowledge takes: they become
        absent. The number of users."""
        found = scan_index(self._env, self._index)
        evicted = (found.flags & np.uint32(Flag.EVICTED)) != 0
        users = found.users[evicted & (found.num_extents == 0)]
        return sum(self.remove(part) for part in np.array_split(users, len(users) // 1024 + 1))

    def _taken_by_tier(self, users: NDArray[np.int64]) -> NDArray[np.int64]:
        """Hand users to the durable tier before they go."""
        evict_to = self._shard.evict_to
        waiting = np.array([user in self._unsaved for user in users.tolist()], np.bool_)
        if evict_to is None or not waiting.any():
            return users
        try:
            evict_to(self._namespace, self.fetch(users[waiting], ALL_ROWS))
        except Exception:  # the tier is down: users it has go first, the log has the others
            if not waiting.all():
                return users[~waiting]
            count = int(waiting.sum())
            self._commit(lambda t: self._changes.count(t, evicted_unsaved=count))
        return users

    def _grow(self, places: int) -> None:
        """Make the file larger by at least ``places``, within the byte budget."""
        chunk, width = self.allocator.chunk_rows, self._file.row_bytes + 8
        more = self._file.growth(chunk, places)
        room = self._shard.room_bytes(self._namespace)
        if room is not None:
            more = min(more, room // width // chunk * chunk)
            if more < places:
                raise BudgetError(f"{self._directory} is at its byte budget")
        before = self._file.places
        self._file.grow(more)
        self.allocator.add_places(before, before + more)

    def _commit(self, change: Callable[[Any], Any]) -> Any:
        """Run a change as one transaction; what it took and released holds only if it commits."""

        def work(transaction: Any) -> tuple[int, Any]:
            self.allocator.abort()  # of an attempt before the index had to grow
            if self.allocator.has_resting:
                self.allocator.wake(self._env.oldest_reader())
            result = change(transaction)
            self._shard.before_commit()
            return transaction.id(), result

        try:
            transaction_id, result = self._env.write(work)
        except BaseException:
            self.allocator.abort()
            raise
        self.allocator.commit(transaction_id)
        return result

    def _check_owned(self, user_ids: NDArray[np.int64]) -> None:
        owned = self._shard.owned()
        if not owned.all() and not owned[user_bucket(user_ids)].all():
            raise BucketMovedError(
                f"{self._directory} does not own all buckets of this batch; nothing of it was "
                "stored. Read the placement again and send each row to the owner of its user"
            )

    def _not_forgotten(
        self, user_ids: NDArray[np.int64], rows: NDArray[np.void]
    ) -> NDArray[np.bool_]:
        kept = np.ones(len(rows), np.bool_)
        forgotten = self._shard.forgotten_until
        if forgotten:
            concerned = np.isin(user_ids, np.fromiter(forgotten, np.int64, len(forgotten)))
            for index in np.flatnonzero(concerned).tolist():
                kept[index] = rows["timestamp_ms"][index] > forgotten[int(user_ids[index])]
        return kept
