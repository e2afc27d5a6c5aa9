"""The memory of a pool as one `marm.memory.Memory`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import numpy as np
import ray
from numpy.typing import NDArray

from cache_actors.pool.gather import ShardAnswer, gather_rows
from cache_actors.store.lmdb_environment import MemoryStoreError
from cache_actors.pool.placement import ShardShare
from cache_actors.pool.save_queue import SaveAck, SaveQueue
from cache_actors.pool.shard_link import MemoryUnavailable, PoolInfo, ShardLink
from cache_actors.pool.shard_reader import ShardReader, ShardWatch
from cache_actors.store.lmdb_memory import StoreStats, check_rows
from marm.memory import RAW_STEP, Namespace, UserRows

logger = logging.getLogger(__name__)

_SAVE_ATTEMPT_S = 30.0
_MAX_ROWS_PER_SAVE_CALL = 8192


@dataclass(frozen=True)
class FetchCounts:
    """What a client has fetched since it was made."""

    users: int = 0
    unavailable_users: int = 0
    rows: int = 0
    memorised_rows: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of fetched rows that training had computed; 0 before the first row."""
        return self.memorised_rows / self.rows if self.rows else 0.0


@dataclass(frozen=True)
class ShardStats:
    """What one shard holds of a namespace; ``held`` is None while it does not answer."""

    shard: int
    is_local: bool
    held: StoreStats | None


@dataclass(frozen=True)
class MemoryStats:
    """What a pool holds of a namespace, and what this client fetched of it."""

    shards: tuple[ShardStats, ...]
    fetched: FetchCounts

    @property
    def users(self) -> int:
        """Users with rows on the shards that answered."""
        return sum(shard.held.users for shard in self.shards if shard.held)

    @property
    def rows(self) -> int:
        """Rows on the shards that answered."""
        return sum(shard.held.rows for shard in self.shards if shard.held)

    @property
    def stored_bytes(self) -> int:
        """Bytes of pages on the shards that answered."""
        return sum(shard.held.stored_bytes for shard in self.shards if shard.held)

    @property
    def hit_rate(self) -> float:
        """See `FetchCounts.hit_rate`."""
        return self.fetched.hit_rate


class MemoryClient:
    """Reads and writes one namespace of a pool. Safe to use from several threads.

    Shards on this node are read from their files, at the cost of a copy; shards elsewhere answer
    one batched call each. Saves always go through the shards' actors. Files must not be used
    across a fork, so make the client in the process that uses it.
    """

    def __init__(
        self,
        pool: PoolInfo,
        namespace: Namespace,
        *,
        read_timeout_s: float = 5.0,
        save_deadline_s: float = 120.0,
        max_pending_saves: int = 8,
        watch_interval_s: float = 5.0,
    ) -> None:
        self._pool = pool
        self._namespace = namespace
        self._read_timeout_s = read_timeout_s
        self._save_deadline_s = save_deadline_s
        self._max_pending_saves = max_pending_saves
        node_id = ray.get_runtime_context().get_node_id()
        self._links = [ShardLink(pool, shard) for shard in range(pool.placement.num_shards)]
        self._readers = [ShardReader(link, namespace, node_id) for link in self._links]
        for reader in self._readers:
            try:
                reader.refresh(read_timeout_s)
            except MemoryUnavailable as error:  # the watch finds it when it is back
                logger.warning("%s", error)
        self._watch = ShardWatch(self._readers, watch_interval_s, read_timeout_s)
        self._queues: dict[int, SaveQueue] = {}
        self._lock = threading.Lock()
        self._fetched = FetchCounts()

    @property
    def namespace(self) -> Namespace:
        """The namespace this client reads and writes."""
        return self._namespace

    def fetch(
        self, user_ids: NDArray[np.int64], n: int, before_ms: NDArray[np.int64] | None = None
    ) -> UserRows:
        """See `marm.memory.Memory.fetch`. Raises `MemoryUnavailable` if a shard does not answer,
        `MemoryStoreError` if its store cannot be read."""
        user_ids = np.asarray(user_ids, np.int64)
        answers, failures = self._ask_shards(user_ids, n, before_ms)
        if failures:
            raise failures[0][1]
        return self._counted(gather_rows(user_ids, self._namespace.row_dtype, answers), 0)

    def fetch_available(
        self, user_ids: NDArray[np.int64], n: int, before_ms: NDArray[np.int64] | None = None
    ) -> tuple[UserRows, NDArray[np.bool_]]:
        """`fetch` of what can be had, and which users' shard failed, ``[U]``; they have no rows."""
        user_ids = np.asarray(user_ids, np.int64)
        answers, failures = self._ask_shards(user_ids, n, before_ms)
        missing = np.zeros(len(user_ids), np.bool_)
        for share, _ in failures:
            missing[share.positions] = True
        rows = gather_rows(user_ids, self._namespace.row_dtype, answers)
        return self._counted(rows, int(missing.sum())), missing

    def save(self, user_ids: NDArray[np.int64], rows: NDArray[np.void]) -> SaveAck:
        """See `marm.memory.Memory.save`. Returns at once unless too many saves are under way.

        A save outlives the restart of a shard: it is repeated until it is acknowledged or
        ``save_deadline_s`` have passed; then `Ack.wait` raises `MemoryUnavailable`.
        """
        user_ids = np.asarray(user_ids, np.int64)
        check_rows(self._namespace, user_ids, rows)
        # Rows are moved as opaque bytes: numpy copies structured rows field by field.
        opaque = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.dtype.itemsize)))
        stored = []
        for share in self._pool.placement.split(user_ids):
            mine = opaque.take(share.positions).view(rows.dtype)
            stored.append(self._queue(share.shard).put(user_ids[share.positions], mine))
        return SaveAck(stored)

    def stats(self) -> MemoryStats:
        """What each shard holds, and what this client has fetched."""
        return MemoryStats(tuple(map(self._shard_stats, self._readers)), self._fetched)

    def close(self) -> None:
        """Return when every save was acknowledged or failed; the client is of no use after."""
        with self._lock:
            queues = list(self._queues.values())
        for queue in queues:
            queue.close()
        self._watch.close()
        for reader in self._readers:
            reader.close()

    def __enter__(self) -> MemoryClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask_shards(
        self, user_ids: NDArray[np.int64], n: int, before_ms: NDArray[np.int64] | None
    ) -> tuple[list[ShardAnswer], list[tuple[ShardShare, Exception]]]:
        """Ask every shard concerned, all at once; the answers and what failed."""
        if n < 0:
            raise ValueError(f"n must be at least 0 rows per user, got {n}")
        deadline = time.monotonic() + self._read_timeout_s
        asked: list[tuple[ShardShare, Callable[[float], UserRows]]] = []
        answers: list[ShardAnswer] = []
        failures: list[tuple[ShardShare, Exception]] = []
        for share in self._pool.placement.split(user_ids):
            before = None if before_ms is None else np.asarray(before_ms)[share.positions]
            try:
                reader = self._readers[share.shard]
                asked.append((share, reader.ask(user_ids[share.positions], n, before)))
            except (MemoryUnavailable, MemoryStoreError) as error:
                failures.append((share, error))
        for share, answer in asked:
            try:
                rows = answer(max(0.0, deadline - time.monotonic()))
                answers.append(ShardAnswer(share.positions, rows))
            except (MemoryUnavailable, MemoryStoreError) as error:
                failures.append((share, error))
        return answers, failures

    def _counted(self, fetched: UserRows, num_unavailable: int) -> UserRows:
        memorised = int(np.count_nonzero(fetched.rows["written_step"] != RAW_STEP))
        with self._lock:
            before = self._fetched
            self._fetched = FetchCounts(
                before.users + len(fetched.user_ids),
                before.unavailable_users + num_unavailable,
                before.rows + len(fetched.rows),
                before.memorised_rows + memorised,
            )
        return fetched

    def _queue(self, shard: int) -> SaveQueue:
        # Made at the first save, so that a client that only reads has no threads for writing.
        with self._lock:
            if shard not in self._queues:
                self._queues[shard] = SaveQueue(
                    partial(self._send, self._links[shard]),
                    self._max_pending_saves,
                    _MAX_ROWS_PER_SAVE_CALL,
                    f"memory-save-{shard}",
                )
            return self._queues[shard]

    def _send(self, link: ShardLink, user_ids: NDArray[np.int64], rows: NDArray[np.void]) -> None:
        link.call_until(
            "save",
            self._namespace,
            user_ids,
            rows,
            attempt_s=_SAVE_ATTEMPT_S,
            deadline_s=self._save_deadline_s,
        )

    def _shard_stats(self, reader: ShardReader) -> ShardStats:
        try:
            held = reader.stats(self._read_timeout_s)
        except MemoryUnavailable:
            held = None
        return ShardStats(reader.link.shard, reader.is_local, held)
