"""Reading one shard the cheapest way there is: its file where this node has it, else its actor."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import numpy as np
import ray
from numpy.typing import NDArray

from cache_actors.store.lmdb_environment import MemoryStoreAbsentError
from cache_actors.pool.shard import ShardInfo
from cache_actors.pool.shard_link import MemoryUnavailable, ShardLink
from cache_actors.pool.shard_stores import ShardStores
from cache_actors.store.lmdb_memory import LmdbMemory, StoreStats
from marm.memory import Namespace, UserRows

logger = logging.getLogger(__name__)


class ShardReader:
    """Reads of one namespace of one shard. Safe to use from threads.

    While the shard's process is dead, its file goes on serving the processes of its node.
    """

    def __init__(self, link: ShardLink, namespace: Namespace, node_id: str) -> None:
        self.link = link
        self._namespace = namespace
        self._node_id = node_id
        self._info: ShardInfo | None = None
        self._local: LmdbMemory | None = None
        self._opened: list[ShardStores] = []

    @property
    def info(self) -> ShardInfo | None:
        """Where the shard was last seen; None if it never answered."""
        return self._info

    @property
    def is_local(self) -> bool:
        """Whether reads go to the file."""
        return self._local is not None

    def refresh(self, timeout_s: float) -> None:
        """Find out where the shard runs, and map its file if that is here."""
        info: ShardInfo = self.link.call("describe", timeout_s=timeout_s)
        known = self._info
        if known is not None and (known.node_id, known.path) == (info.node_id, info.path):
            self._info = info
            return
        self.link.call("open_namespace", self._namespace, timeout_s=timeout_s)
        self._local = self._open(info) if info.node_id == self._node_id else None
        self._info = info

    def ask(
        self, user_ids: NDArray[np.int64], n: int, before_ms: NDArray[np.int64] | None
    ) -> Callable[[float], UserRows]:
        """Begin a fetch; the result takes the time left for it in seconds and gives the rows."""
        local = self._local
        if local is not None:
            return lambda timeout_s: local.fetch(user_ids, n, before_ms)
        reply = self.link.submit("fetch", self._namespace, user_ids, n, before_ms)
        return lambda timeout_s: self.link.result(reply, timeout_s)

    def stats(self, timeout_s: float) -> StoreStats:
        """What the shard holds."""
        local = self._local
        if local is not None:
            return local.stats()
        held: StoreStats = self.link.call("stats", self._namespace, timeout_s=timeout_s)
        return held

    def close(self) -> None:
        """Close the file."""
        self._local = None
        while self._opened:
            self._opened.pop().close()

    def _open(self, info: ShardInfo) -> LmdbMemory | None:
        # A file that is replaced stays open until `close`: other threads may be reading it.
        stores = ShardStores(info.path, info.max_rows_per_user, readonly=True)
        try:
            local = stores.of(self._namespace)
        except MemoryStoreAbsentError:  # same node, other file system: a container of its own
            return None
        self._opened.append(stores)
        return local


class ShardWatch:
    """Looks from time to time whether shards moved to other nodes, from a thread of its own."""

    def __init__(self, readers: Sequence[ShardReader], interval_s: float, timeout_s: float) -> None:
        self._readers = readers
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-shard-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        # Ray would start a cluster of its own if it were called after a shutdown.
        while not self._stop.wait(self._interval_s) and ray.is_initialized():
            for reader in self._readers:
                try:
                    reader.refresh(self._timeout_s)
                except MemoryUnavailable as error:
                    logger.debug("%s", error)
                except Exception:  # the watch must outlive whatever one look runs into
                    logger.warning("could not look after a memory shard", exc_info=True)
