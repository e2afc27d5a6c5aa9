"""One namespace of a shard, as any process of the node reads it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.counters import NamespaceCounters
from cache_actors.store.errors import MemoryStoreAbsentError, NamespaceMismatchError
from cache_actors.store.lmdb_environment import LmdbEnvironment
from cache_actors.store.lookup import ALL_ROWS, Lookup
from cache_actors.store.records import (
    NO_WORDS,
    WORD_BYTES,
    RecordBatch,
    record_key,
    record_words,
    users_of_keys,
)
from cache_actors.store.row_file import RowFile
from cache_actors.store.row_formats import decode, decode_into
from cache_actors.store.row_reads import (
    DamagedBorderError,
    Gathered,
    copy_sound_runs,
    find_one,
    gather_batch,
    state_gives_rows,
    user_states,
)
from cache_actors.store.rules import ReadRules
from marm.memory import Namespace, UserRows

_ONE_BY_ONE_USERS = 4
"""Up to so many users, plain Python is faster than columns."""

_USERS_PER_CHUNK = 256


@dataclass(frozen=True)
class StoreStats:
    """What a store holds of a namespace.

    Attributes:
        stored_bytes: places and index pages in use.
        file_bytes: size of the row files.
        counters: see `NamespaceCounters`.
    """

    stored_bytes: int
    file_bytes: int
    counters: NamespaceCounters

    @property
    def users(self) -> int:
        """Users with rows."""
        return self.counters.users

    @property
    def rows(self) -> int:
        """Rows on disk; where users have a row limit, some of them are hidden."""
        return self.counters.rows


class NamespaceStore:
    """Reads of one namespace. Safe to use from several threads."""

    def __init__(self, env: LmdbEnvironment, directory: Path, namespace: Namespace) -> None:
        self._env = env
        self._directory = directory
        self._namespace = namespace
        self._row_dtype = namespace.row_dtype
        self._is_plain = namespace.stored_dtype == namespace.row_dtype
        self._index = env.table(b"index/" + namespace.name.encode())
        self._facts = env.table(b"facts")
        self._rules_key = b"rules/" + namespace.name.encode()
        self._counters_key = b"counters/" + namespace.name.encode()
        stored = env.read(self._rules_bytes)
        if stored is None:
            raise MemoryStoreAbsentError(
                f"namespace {namespace.name} is not in {directory} yet; open it with the writer"
            )
        rules = ReadRules.unpack(stored)
        self._known = stored, rules, self._open_file(rules)  # of one moment: threads share it

    @property
    def namespace(self) -> Namespace:
        """The namespace of all rows here."""
        return self._namespace

    def lookup(
        self,
        user_ids: NDArray[np.int64],
        n: int,
        before_ms: NDArray[np.int64] | None = None,
        *,
        layers: int | None = None,
    ) -> Lookup:
        """Every user's newest ``n`` rows before a time, and what is known of each user.

        Args:
            user_ids: distinct users, ``[U]``.
            n: rows per user.
            before_ms: ``[U]``; only rows strictly older are given.
            layers: give only the first so many layers of ``memory``; 0 for raw rows, None for all.
        """
        if n < 0:
            raise ValueError(f"n must be at least 0 rows per user, got {n}")
        self._namespace.layers_dtype(layers)  # refuses a wrong number of layers
        user_ids = np.ascontiguousarray(user_ids, np.int64)
        if user_ids.ndim != 1:
            raise ValueError(f"user_ids must be one id after another, got shape {user_ids.shape}")
        times = None if before_ms is None else np.asarray(before_ms, np.int64)
        if times is not None and times.shape != user_ids.shape:
            raise ValueError(
                f"before_ms must have one time per user, got {times.shape} for {user_ids.shape}"
            )
        gather = self._gather_columns
        if len(user_ids) <= _ONE_BY_ONE_USERS:
            gather = self._gather_one_by_one
        found = self._env.read(partial(gather, user_ids, min(n, ALL_ROWS), times))
        stored = found.rows.view(self._namespace.stored_dtype)
        offsets = np.zeros(len(user_ids) + 1, np.int64)
        np.cumsum(found.counts, out=offsets[1:])
        rows = decode(self._namespace, stored, layers)
        return Lookup(UserRows(user_ids, offsets, rows), found.state)

    def fetch(
        self,
        user_ids: NDArray[np.int64],
        n: int,
        before_ms: NDArray[np.int64] | None = None,
        *,
        layers: int | None = None,
    ) -> UserRows:
        """See `marm.memory.Memory.fetch`. The rows are the caller's own copy."""
        return self.lookup(user_ids, n, before_ms, layers=layers).rows

    def fetch_into(self, user_id: int, n: int, out: NDArray[np.void]) -> int:
        """Copy a user's newest ``n`` rows into ``out [>= n]``, oldest first; how many there were.

        The cheapest read there is: no memory is allocated. Damaged rows make it 0; `lookup` tells
        them from a user without rows.
        """
        is_right = out.dtype is self._row_dtype or out.dtype == self._row_dtype  # slow to compare
        if not is_right or out.ndim != 1 or not out.flags.c_contiguous:
            raise NamespaceMismatchError.of("the array to read into", self._namespace, out.dtype)
        if n < 0 or n > len(out):
            raise ValueError(f"n must be between 0 and the {len(out)} rows of out, got {n}")
        return self._env.read(partial(self._read_into, user_id, n, out))

    def users(self, bucket: int) -> NDArray[np.int64]:
        """Users of a bucket that the index knows, also evicted ones."""
        keys: list[bytes] = []
        while page := self._env.read(partial(self._keys_from, bucket, keys[-1] if keys else None)):
            keys += page
        return users_of_keys(keys)

    def scan(self, bucket: int) -> Iterator[UserRows]:
        """All rows of the users of ``bucket``, some users at a time. Each chunk is read as of when
        it is reached; rows beyond a user's limit and expired users are left out."""
        users = self.users(bucket)
        for start in range(0, len(users), _USERS_PER_CHUNK):
            rows = self.fetch(users[start : start + _USERS_PER_CHUNK], ALL_ROWS)
            if len(rows.rows):
                yield rows

    @property
    def index_bytes(self) -> int:
        """Bytes of index pages in use."""
        return self._env.read(self._index_bytes)

    @property
    def file_bytes(self) -> int:
        """Size of the row files."""
        return self._file.file_bytes

    @property
    def file_number(self) -> int:
        """Which row file holds the rows now."""
        return self._known[1].file_number

    def stats(self) -> StoreStats:
        """What is stored."""
        return self._env.read(self._stats)

    def close(self) -> None:
        """Close the row file. The handle must not be used afterwards."""
        self._file.close()

    @property
    def _file(self) -> RowFile:
        return self._known[2]

    def _open_file(self, rules: ReadRules) -> RowFile:
        path = self._directory / f"{self._namespace.name}-{rules.file_number:04d}"
        return RowFile(path, self._namespace.stored_dtype, self._env.readonly)

    def _rules_bytes(self, transaction: Any) -> bytes | None:
        stored = transaction.get(self._rules_key, None, self._facts)
        return None if stored is None else bytes(stored)

    def _rules(self, transaction: Any) -> tuple[ReadRules, RowFile]:
        """The rules as of the transaction, and the file they speak of."""
        stored = transaction.get(self._rules_key, None, self._facts)
        known, rules, file = self._known
        if stored != known:
            if stored is None:
                raise MemoryStoreAbsentError(f"namespace {self._namespace.name} was dropped")
            fresh = ReadRules.unpack(bytes(stored))
            if fresh.file_number < rules.file_number:
                raise MemoryStoreAbsentError(
                    f"namespace {self._namespace.name} was dropped while it was read; read again"
                )
            if fresh.file_number > rules.file_number:
                file = self._open_file(fresh)
            self._known = bytes(stored), fresh, file
            return fresh, file
        return rules, file

    def _gather_columns(
        self,
        user_ids: NDArray[np.int64],
        n: int,
        before_ms: NDArray[np.int64] | None,
        transaction: Any,
    ) -> Gathered:
        rules, file = self._rules(transaction)
        batch = RecordBatch.read(transaction, self._index, user_ids)
        return gather_batch(batch, user_ids, n, before_ms, file, rules, int(time.time()))

    def _gather_one_by_one(
        self,
        user_ids: NDArray[np.int64],
        n: int,
        before_ms: NDArray[np.int64] | None,
        transaction: Any,
    ) -> Gathered:
        rules, file = self._rules(transaction)
        batch = RecordBatch.read(transaction, self._index, user_ids)
        state = user_states(batch, user_ids, rules, int(time.time()))
        readable = state_gives_rows(state).tolist()
        times: Sequence[int | None] = [None] * len(readable)
        if before_ms is not None:
            times = before_ms.tolist()
        found = []
        for index, user_id in enumerate(user_ids.tolist()):
            words = batch.words_of(index) if readable[index] else NO_WORDS
            limit = rules.max_rows_per_user
            try:
                found.append(find_one(words, user_id, n, times[index], file, limit))
            except DamagedBorderError:
                return gather_batch(batch, user_ids, n, before_ms, file, rules, int(time.time()))
        counts = np.array([count for _, count in found], np.int64)
        row_words = file.row_words
        out = np.empty(int(counts.sum()) * row_words, np.uint64)
        position = 0
        sound = True
        for (runs, count), user_id in zip(found, user_ids.tolist(), strict=True):
            part = out[position : position + count * row_words]
            sound = sound and copy_sound_runs(runs, file, part, user_id)
            position += count * row_words
        if not sound:  # rare: the other way tells which rows to leave out
            return gather_batch(batch, user_ids, n, before_ms, file, rules, int(time.time()))
        return Gathered(out.view(np.dtype((np.void, file.row_bytes))), counts, state)

    def _read_into(self, user_id: int, n: int, out: NDArray[np.void], transaction: Any) -> int:
        rules, file = self._rules(transaction)
        key = record_key(user_id)
        value = transaction.get(key, None, self._index)
        words = None if value is None else record_words(value, user_id)
        if words is None or not rules.owned[key[0]]:
            return 0
        if rules.ttl_s is not None and (words[3] >> 32) + rules.ttl_s < int(time.time()):
            return 0
        runs, count = find_one(words, user_id, n, None, file, rules.max_rows_per_user)
        if self._is_plain:
            words_out = out.view(np.uint64)[: count * file.row_words]
            return count if copy_sound_runs(runs, file, words_out, user_id) else 0
        stored = np.empty(count, self._namespace.stored_dtype)
        if not copy_sound_runs(runs, file, stored.view(np.uint64), user_id):
            return 0
        decode_into(self._namespace, stored, out[:count])
        return count

    def _keys_from(self, bucket: int, after: bytes | None, transaction: Any) -> list[bytes]:
        """Up to some thousand keys of a bucket that follow ``after``."""
        cursor = transaction.cursor(self._index)
        seek = bytes([bucket]) if after is None else after + b"\0"
        keys: list[bytes] = []
        if cursor.set_range(seek):
            for key in cursor.iternext(keys=True, values=False):
                if key[0] != bucket or len(keys) == 16 * _USERS_PER_CHUNK:
                    break
                keys.append(bytes(key))
        return keys

    def _stats(self, transaction: Any) -> StoreStats:
        _, file = self._rules(transaction)
        stored = transaction.get(self._counters_key, None, self._facts)
        counters = NamespaceCounters.unpack(stored)
        used = counters.places * (file.row_bytes + WORD_BYTES) + self._index_bytes(transaction)
        return StoreStats(used, file.file_bytes, counters)

    def _index_bytes(self, transaction: Any) -> int:
        table = transaction.stat(self._index)
        pages: int = table["branch_pages"] + table["leaf_pages"] + table["overflow_pages"]
        return pages * table["psize"]
