"""A memory on disk: rows of one namespace in an LMDB directory, with one writer and many readers.

Readers in other processes map the same file, so a read is a copy out of the page cache and never
waits for the writer. A save is one transaction. Rows survive the death of every process.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.lmdb_environment import (
    LmdbEnvironment,
    MemoryStoreAbsentError,
    MemoryStoreError,
    NamespaceMismatchError,
    open_environment,
)
from cache_actors.store.page_reads import PageReader
from cache_actors.store.page_writes import PageWriter, RowBatch
from cache_actors.store.pages import NEWEST, Buffer, PageLayout, key_prefixes, user_of_prefix
from marm.memory import DoneAck, Namespace, UserRows

STORE_FORMAT = 1
"""Version of the stored layout."""

_COUNTERS = struct.Struct("<qq")
_MAP_SIZE_BYTES = 1 << 30
_MAX_MAP_SIZE_BYTES = 1 << 42
_SAVES_PER_READER_CHECK = 256


@dataclass(frozen=True)
class StoreStats:
    """What a store holds. ``rows`` counts rows on disk: where users have a row limit, that may be
    up to a page more for each than can be fetched."""

    users: int
    rows: int
    stored_bytes: int


class LmdbMemory:
    """`marm.memory.Memory` on an LMDB directory. Safe to use from several threads.

    ``map_size_bytes`` is where the address space starts; it doubles as needed up to
    ``max_map_size_bytes``. A reader must be given the ``max_rows_per_user`` of the writer.
    """

    def __init__(
        self,
        path: Path,
        namespace: Namespace,
        *,
        readonly: bool = False,
        map_size_bytes: int = _MAP_SIZE_BYTES,
        max_map_size_bytes: int = _MAX_MAP_SIZE_BYTES,
        max_rows_per_user: int | None = None,
    ) -> None:
        if max_rows_per_user is not None and max_rows_per_user < 1:
            raise ValueError(
                f"max_rows_per_user must be at least 1, or None for all, got {max_rows_per_user}"
            )
        self._namespace = namespace
        self._layout = PageLayout.of(namespace)
        self._reader = PageReader(self._layout, max_rows_per_user)
        self._writer = PageWriter(self._layout, max_rows_per_user)
        self._readonly = readonly
        self._num_saves = 0
        self._env: LmdbEnvironment = open_environment(
            path, readonly, map_size_bytes, max_map_size_bytes
        )
        try:
            self._check_identity()
        except BaseException:
            self._env.close()
            raise

    @property
    def namespace(self) -> Namespace:
        """The namespace of all rows here."""
        return self._namespace

    def fetch(
        self, user_ids: NDArray[np.int64], n: int, before_ms: NDArray[np.int64] | None = None
    ) -> UserRows:
        """See `marm.memory.Memory.fetch`. The rows are the caller's own copy."""
        if n < 0:
            raise ValueError(f"n must be at least 0 rows per user, got {n}")
        user_ids = np.asarray(user_ids, np.int64)
        prefixes = key_prefixes(user_ids)
        times: list[int | None] = [None] * len(user_ids)
        if before_ms is not None:
            times = np.asarray(before_ms, np.int64).tolist()
        counts = [0]

        def collect(transaction: Any) -> bytearray:
            cursor = transaction.cursor(self._env.pages)
            parts: list[Buffer] = []
            for prefix, before in zip(prefixes, times, strict=True):
                counts.append(self._reader.collect_newest(cursor, prefix, n, before, parts))
            return bytearray().join(parts)

        data = self._env.read(collect)
        return UserRows(user_ids, np.cumsum(counts), self._layout.rows(data))

    def save(self, user_ids: NDArray[np.int64], rows: NDArray[np.void]) -> DoneAck:
        """See `marm.memory.Memory.save`: one transaction, committed when this returns."""
        user_ids = np.asarray(user_ids, np.int64)
        check_rows(self._namespace, user_ids, rows)
        if self._readonly:
            raise MemoryStoreError(f"store {self._env.path} is open for reading; it cannot save")
        if not len(rows):
            return DoneAck()
        batch = RowBatch.of(user_ids, rows)
        self._env.write(lambda transaction, before: self._upsert(transaction, before, batch))
        self._num_saves += 1
        if self._num_saves % _SAVES_PER_READER_CHECK == 0:
            self._env.forget_dead_readers()
        return DoneAck()

    def scan(self, bucket: int) -> Iterator[tuple[int, NDArray[np.void]]]:
        """Every user of ``bucket`` with its rows. Each user is read as of when it is reached."""
        seek = bytes([bucket])
        while True:
            user = self._env.read(partial(self._user_at, seek))
            if user is None or user[0][0] != bucket:
                return
            prefix, data = user
            yield user_of_prefix(prefix), self._layout.rows(data)
            seek = prefix + NEWEST + b"\0"

    def stats(self) -> StoreStats:
        """Users, rows, and the bytes that their pages occupy."""

        def count(transaction: Any) -> StoreStats:
            users, rows = self._counters(transaction)
            table = transaction.stat(self._env.pages)
            num_pages = table["branch_pages"] + table["leaf_pages"] + table["overflow_pages"]
            return StoreStats(users, rows, num_pages * table["psize"])

        return self._env.read(count)

    def flush(self) -> None:
        """Make every saved row survive a crash of the machine too."""
        self._env.flush()

    def close(self) -> None:
        """Give the directory back. The handle must not be used afterwards."""
        self._env.close()

    def _user_at(self, seek: bytes, transaction: Any) -> tuple[bytes, bytearray] | None:
        return self._reader.user_at(transaction.cursor(self._env.pages), seek)

    def _upsert(self, transaction: Any, before: Any, batch: RowBatch) -> None:
        growth = self._writer.upsert(
            before.cursor(self._env.pages), transaction.cursor(self._env.pages), batch
        )
        users, rows = self._counters(transaction)
        counters = _COUNTERS.pack(users + growth.users, rows + growth.rows)
        transaction.put(b"counters", counters, db=self._env.facts)

    def _counters(self, transaction: Any) -> tuple[int, int]:
        stored = transaction.get(b"counters", db=self._env.facts)
        return (0, 0) if stored is None else _COUNTERS.unpack(stored)

    def _check_identity(self) -> None:
        """Write the namespace into a new store; refuse a store of another one."""

        def read(transaction: Any) -> bytes | None:
            stored = transaction.get(b"identity", db=self._env.facts)
            return None if stored is None else bytes(stored)

        identity = {"format": STORE_FORMAT, "namespace": asdict(self._namespace)}
        stored = self._env.read(read)
        if stored is None:
            if self._readonly:
                raise MemoryStoreAbsentError(
                    f"store {self._env.path} is not initialised yet; let its writer open it first"
                )
            text = json.dumps(identity).encode()
            self._env.write(
                lambda transaction, _: transaction.put(b"identity", text, db=self._env.facts)
            )
            return
        found = json.loads(stored)
        if found.get("format") != STORE_FORMAT:
            raise MemoryStoreError(
                f"store {self._env.path} must have format {STORE_FORMAT}, has "
                f"{found.get('format')}; delete that directory and replay the event log"
            )
        if found != identity:
            raise NamespaceMismatchError.of(
                f"store {self._env.path}", self._namespace, found.get("namespace")
            )


def check_rows(namespace: Namespace, user_ids: NDArray[np.int64], rows: NDArray[np.void]) -> None:
    """Refuse rows that are not of ``namespace`` or not one per user id."""
    if rows.dtype != namespace.row_dtype:
        raise NamespaceMismatchError.of("the array to save", namespace, rows.dtype)
    if user_ids.shape != rows.shape or rows.ndim != 1:
        raise ValueError(
            f"save needs one user id per row, got {user_ids.shape} ids for {rows.shape} rows"
        )
