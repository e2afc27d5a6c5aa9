"""The memory of a pool as one `marm.memory.Memory`."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from types import TracebackType

import numpy as np
import ray
from numpy.typing import NDArray

from cache_actors.pool.client_stats import FetchCounts, MemoryStats, ShardStats
from cache_actors.pool.errors import MemoryUnavailable
from cache_actors.pool.metrics import ClientMetrics
from cache_actors.pool.placement import PlacementError
from cache_actors.pool.pool_reads import PoolAnswer, PoolReads, Question
from cache_actors.pool.pool_saves import PoolSaves
from cache_actors.pool.routes import Routes
from cache_actors.pool.save_queue import SaveAck
from cache_actors.pool.shard_link import RETRY_PAUSE_S, PoolInfo
from cache_actors.pool.shard_reader import ShardReader
from cache_actors.pool.shard_tier import connect_tier
from cache_actors.pool.shard_watch import ShardWatch
from cache_actors.pool.staleness import UNBOUNDED, NewestStep, StalenessBound
from cache_actors.store.errors import MemoryStoreAbsentError, MemoryStoreError
from cache_actors.store.row_checks import check_rows
from marm.memory import RAW_STEP, Namespace, UserRows

logger = logging.getLogger(__name__)

_PASSING = (MemoryUnavailable, MemoryStoreAbsentError)
"""Raised while a shard restarts, and when its files are mapped anew just now."""


class MemoryClient:
    """Reads and writes one namespace of a pool. Safe to use from several threads.

    Shards on this node are read from their files, at the cost of a copy; shards elsewhere answer
    one batched call each; while no replica of a shard can be reached, the durable tier is read.
    Saves always go through the shards' actors. Files must not be used across a fork, so make the
    client in the process that uses it.

    Rows that are older than ``staleness`` allows are given as raw rows: a miss for this reader.
    """

    def __init__(
        self,
        pool: PoolInfo,
        namespace: Namespace,
        *,
        staleness: StalenessBound = UNBOUNDED,
        read_timeout_s: float = 5.0,
        save_deadline_s: float = 120.0,
        max_pending_saves: int = 32,
        watch_interval_s: float = 5.0,
    ) -> None:
        self._namespace = namespace
        self._staleness = staleness
        self._read_timeout_s = read_timeout_s
        self._routes = Routes(pool, read_timeout_s)
        self._tier = connect_tier(pool.config.redis_url, pool.tier_name)
        node_id = ray.get_runtime_context().get_node_id()
        self._reads = PoolReads(
            self._routes,
            namespace,
            node_id,
            self._tier,
            pool.config.redis_url is not None,
            read_timeout_s,
        )
        self._saves = PoolSaves(self._routes, namespace, max_pending_saves, save_deadline_s)
        self._newest = NewestStep()
        self._lock = threading.Lock()
        self._fetched = FetchCounts()
        self._metrics = ClientMetrics(namespace)
        self._look_after_shards()
        self._watch = ShardWatch(self._look_after_shards, watch_interval_s)

    @property
    def namespace(self) -> Namespace:
        """The namespace this client reads and writes."""
        return self._namespace

    def fetch(
        self,
        user_ids: NDArray[np.int64],
        n: int,
        before_ms: NDArray[np.int64] | None = None,
        *,
        layers: int | None = None,
    ) -> UserRows:
        """See `marm.memory.Memory.fetch`; ``layers`` selects the first layers, 0 for raw rows.

        A shard that restarts is asked again. Raises `MemoryUnavailable` if it does not answer for
        ``read_timeout_s``, `MemoryStoreError` if its store cannot be read."""
        question = self._question(user_ids, n, before_ms, layers)
        began_s = time.perf_counter()
        deadline = time.monotonic() + self._read_timeout_s
        while True:
            answer = self._reads.lookup(question, deadline - time.monotonic())
            if not answer.failures:
                return self._counted(answer, began_s)
            problems = [problem for _, problem in answer.failures]
            lasting = [each for each in problems if not isinstance(each, _PASSING)]
            if lasting or time.monotonic() + RETRY_PAUSE_S >= deadline:
                raise (lasting or problems)[0]
            time.sleep(RETRY_PAUSE_S)

    def fetch_available(
        self,
        user_ids: NDArray[np.int64],
        n: int,
        before_ms: NDArray[np.int64] | None = None,
        *,
        layers: int | None = None,
        timeout_s: float | None = None,
    ) -> tuple[UserRows, NDArray[np.bool_]]:
        """`fetch` of what can be had, and which users' shard failed, ``[U]``; they have no rows.

        ``timeout_s`` shortens the client's ``read_timeout_s`` for this call."""
        question = self._question(user_ids, n, before_ms, layers)
        began_s = time.perf_counter()
        answer = self._reads.lookup(question, timeout_s)
        missing = np.zeros(len(answer.found.state), np.bool_)
        for positions, _ in answer.failures:
            missing[positions] = True
        return self._counted(answer, began_s), missing

    def save(self, user_ids: NDArray[np.int64], rows: NDArray[np.void]) -> SaveAck:
        """See `marm.memory.Memory.save`. Returns at once unless too many saves are under way.

        A save outlives the restart of a shard: it is repeated until it is acknowledged or
        ``save_deadline_s`` have passed; then `Ack.wait` raises `MemoryUnavailable`.
        """
        user_ids = np.asarray(user_ids, np.int64)
        check_rows(self._namespace, user_ids, rows)
        return self._saves.save(user_ids, rows)

    def stats(self) -> MemoryStats:
        """What each shard holds, and what this client has fetched."""
        return MemoryStats(tuple(map(self._shard_stats, self._reads.readers)), self._fetched)

    def close(self) -> None:
        """Return when every save was acknowledged or failed; the client is of no use after."""
        self._saves.close()
        self._watch.close()
        for reader in self._reads.readers:
            reader.close()
        if self._tier is not None:
            self._tier.close()

    def __enter__(self) -> MemoryClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _question(
        self,
        user_ids: NDArray[np.int64],
        n: int,
        before_ms: NDArray[np.int64] | None,
        layers: int | None,
    ) -> Question:
        if n < 0:
            raise ValueError(f"n must be at least 0 rows per user, got {n}")
        self._namespace.layers_dtype(layers)  # refuses a wrong number of layers
        user_ids = np.asarray(user_ids, np.int64)
        if before_ms is not None:
            before_ms = np.asarray(before_ms, np.int64)
            if before_ms.shape != user_ids.shape:
                raise ValueError(
                    f"before_ms must have one time per user, got {before_ms.shape} for "
                    f"{user_ids.shape}"
                )
        return Question(user_ids, n, before_ms, layers)

    def _counted(self, answer: PoolAnswer, began_s: float) -> UserRows:
        """The rows of an answer as this reader may see them, counted and timed."""
        self._metrics.read(time.perf_counter() - began_s, answer.found.rows.rows)
        newest_step = self._newest.see(answer.found.rows.rows)
        rows, num_stale = self._staleness.apply(answer.found.rows, newest_step, time.time())
        memorised = int(np.count_nonzero(rows.rows["written_step"] != RAW_STEP))
        unavailable = sum(len(positions) for positions, _ in answer.failures)
        with self._lock:
            before = self._fetched
            self._fetched = FetchCounts(
                before.users + len(rows.user_ids),
                before.unavailable_users + unavailable,
                before.rows + len(rows.rows),
                before.memorised_rows + memorised,
                before.stale_rows + num_stale,
                before.recalled_users + answer.recalled_users,
                before.damaged_users + answer.damaged_users,
            )
        return rows

    def _look_after_shards(self) -> None:
        """Follow moves of shards and buckets, and tell the shards what was read."""
        with contextlib.suppress(PlacementError):
            self._routes.refresh()
        for reader in self._reads.readers:
            try:
                reader.refresh(self._read_timeout_s)
                reader.report_used()
                if self._staleness.max_steps is not None:
                    held = reader.stats(self._read_timeout_s)
                    self._newest.see_step(held.counters.newest_step)
            except (MemoryUnavailable, MemoryStoreError) as error:  # a later look finds it
                logger.debug("%s", error)
        counts = {
            (reader.link.shard, tier): counted
            for reader in self._reads.readers
            for tier, counted in reader.counts.items()
        }
        self._metrics.publish(self._fetched, self._saves.num_pending, self._newest.value, counts)

    def _shard_stats(self, reader: ShardReader) -> ShardStats:
        try:
            held = reader.stats(self._read_timeout_s)
        except MemoryUnavailable:
            held = None
        return ShardStats(reader.link.shard, reader.is_local, held)
