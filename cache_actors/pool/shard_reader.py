"""Reading one shard the cheapest way there is just now."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache_actors.pool.client_stats import ReadCounts
from cache_actors.pool.errors import MemoryUnavailable
from cache_actors.pool.leader_link import LeaderLink
from cache_actors.pool.node_note import noted_node
from cache_actors.pool.readers import CacheReader, LocalReader, Pending, RemoteReader, TierReader
from cache_actors.pool.shard_info import ShardInfo
from cache_actors.store.errors import MemoryStoreAbsentError, MemoryStoreError
from cache_actors.store.lookup import Lookup
from cache_actors.store.mapped_shard import MappedShard
from cache_actors.store.namespace_store import StoreStats
from cache_actors.tiers.durable_tier import DurableTier, DurableTierError
from marm.memory import Namespace

logger = logging.getLogger(__name__)

READ_FAILURES = (MemoryUnavailable, MemoryStoreError, DurableTierError)
"""What a way to read may raise where another way may succeed."""

_MAX_UNREPORTED_READS = 4096


class ShardReader:
    """Reads of one namespace of one shard. Safe to use from threads.

    The files of a replica on this node come first: they go on serving while its process is dead.
    Then come replicas on other nodes, and then the durable tier.
    """

    def __init__(
        self, link: LeaderLink, namespace: Namespace, node_id: str, tier: DurableTier | None
    ) -> None:
        self.link = link
        self._namespace = namespace
        self._node_id = node_id
        self._remote = [RemoteReader(each, namespace) for each in link.links]
        self._tier = None if tier is None else TierReader(tier, namespace)
        self._mapped: LocalReader | None = None
        self._serving = 0
        self._is_open = False
        self.is_warm = True
        self.counts: dict[str, ReadCounts] = {}
        self._used: deque[NDArray[np.int64]] = deque(maxlen=_MAX_UNREPORTED_READS)

    @property
    def is_local(self) -> bool:
        """Whether reads go to files."""
        return self._local() is not None

    def refresh(self, timeout_s: float) -> None:
        """Find out where the shard runs, and map its files if they are here. Called by one thread
        at a time."""
        if self._mapped is not None and self._local() is None:
            self._unmap()  # its store was replaced, or it is not up to date
        if self._mapped is None:
            self._map_noted()
        if not self._is_open:
            self.link.call("open_namespace", self._namespace, timeout_s=timeout_s)
            self._is_open = True
        found = [info for info in self._describe(timeout_s) if info.is_member]
        here = [info for info in found if info.node_id == self._node_id]
        if here and self._mapped is None:
            self._map(here[0].replica, here[0].path, here[0].generation)
        for info in here or found:
            self._serving, self.is_warm = info.replica, info.is_warm
            return
        raise self.link.leader.unavailable("has no replica that is up to date")

    def report_used(self) -> None:
        """Tell the shard which users were read from its files, so that others are evicted first."""
        read = [self._used.popleft() for _ in range(len(self._used))]
        local = self._mapped
        if read and local is not None:
            users = np.unique(np.concatenate(read))
            with contextlib.suppress(MemoryUnavailable):
                self.link.links[local.replica].submit("touch", self._namespace, users)

    def begin(
        self,
        user_ids: NDArray[np.int64],
        n: int,
        before_ms: NDArray[np.int64] | None,
        layers: int | None,
    ) -> Pending:
        """See `CacheReader.begin`. What fails on one way is tried on the next."""

        def ask(way: CacheReader) -> Pending:
            pending = way.begin(user_ids, n, before_ms, layers)
            return lambda left_s: self._counted(way.tier, pending(left_s))

        ways = self._ways()
        first = _begin_first(ways, ask, None)

        def wait(left_s: float) -> Lookup:
            deadline = time.monotonic() + left_s
            pending = first
            while True:
                try:
                    return pending(max(0.0, deadline - time.monotonic()))
                except READ_FAILURES as error:
                    pending = _begin_first(ways, ask, error)

        self._used.append(user_ids)
        return wait

    def recall(self, user_ids: NDArray[np.int64], timeout_s: float) -> None:
        """Have the replica that is read bring users back from the durable tier."""
        link = self.link.links[self._serving]
        link.call("recall", self._namespace, user_ids, timeout_s=timeout_s)

    def report_damage(self, user_ids: NDArray[np.int64]) -> None:
        """Have the replica that is read drop rows that failed their check."""
        with contextlib.suppress(MemoryUnavailable):
            self.link.links[self._serving].submit("repair", self._namespace, user_ids)

    def stats(self, timeout_s: float) -> StoreStats:
        """What the shard holds."""
        local = self._local()
        if local is not None:
            return local.stats()
        held: StoreStats = self.link.call("stats", self._namespace, timeout_s=timeout_s)
        return held

    def close(self) -> None:
        """Close the files."""
        self._unmap()

    def _local(self) -> LocalReader | None:
        """The files on this node, if they are those of a replica that has every row."""
        local = self._mapped
        if local is None:
            return None
        generation = self.link.record.recent().generation_of(local.replica)
        return local if generation == local.generation else None

    def _counted(self, tier: str, found: Lookup) -> Lookup:
        before = self.counts.get(tier, ReadCounts())  # a lost race loses a count, not a row
        num_found = int(np.count_nonzero(found.rows.counts))
        self.counts[tier] = ReadCounts(before.asked + len(found.state), before.found + num_found)
        return found

    def _describe(self, timeout_s: float) -> Iterator[ShardInfo]:
        """The replicas that answer, the members first."""
        members = self.link.record.current().replicas
        for replica in members or range(len(self.link.links)):
            with contextlib.suppress(MemoryUnavailable):
                yield self.link.links[replica].call("describe", timeout_s=timeout_s)

    def _ways(self) -> Iterator[CacheReader]:
        local = self._local()
        if local is not None:
            yield local
        members = self.link.record.recent().replicas
        for replica in members or (0,):
            yield self._remote[replica]
        if self._tier is not None:
            yield self._tier

    def _map_noted(self) -> None:
        """Map files that are known to be here without asking: their process may be restarting."""
        pool, shard = self.link.pool, self.link.shard
        for member in self.link.record.current().members:
            if noted_node(pool, shard, member.replica) == self._node_id:
                with contextlib.suppress(MemoryStoreError):  # its process tells more of it
                    path = pool.store_directory(shard, member.replica)
                    self._map(member.replica, path, member.generation)
                if self._mapped is not None:
                    return

    def _map(self, replica: int, path: Path, generation: str) -> None:
        try:
            shard = MappedShard(path)
        except MemoryStoreAbsentError:  # same node, other file system: a container of its own
            return
        try:
            if shard.generation == generation:  # else others here still hold its predecessor
                self._mapped = LocalReader(replica, shard, self._namespace)
        except MemoryStoreAbsentError:
            logger.debug("namespace %s is not in %s yet", self._namespace.name, path)
        finally:
            if self._mapped is None:
                shard.close()

    def _unmap(self) -> None:
        local, self._mapped = self._mapped, None
        if local is not None:
            local.close()


def _begin_first(
    ways: Iterator[CacheReader],
    ask: Callable[[CacheReader], Pending],
    problem: Exception | None,
) -> Pending:
    """Begin on the next way that can; else raise what went wrong first."""
    for way in ways:
        try:
            return ask(way)
        except READ_FAILURES as error:
            problem = problem or error
    raise problem or MemoryUnavailable("a memory shard has no replica")
