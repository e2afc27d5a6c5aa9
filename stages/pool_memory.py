"""The namespaces of a pool as serving reads them."""

from __future__ import annotations

import threading

from cache_actors.pool.client import MemoryClient
from cache_actors.pool.shard_link import PoolInfo
from cache_actors.pool.staleness import UNBOUNDED, StalenessBound
from marm.memory import Namespace

READ_TIMEOUT_S = 0.5
"""A shard on another node that takes longer than this is a miss: the request can't wait for it."""


class PoolMemory:
    """One client per namespace of a pool, made when it is first asked for and then kept.

    A client can be made while shards are down; it finds them by itself when they are back. Rows
    that are older than ``staleness`` allows are read as if they had not been computed.
    """

    def __init__(self, pool: PoolInfo, staleness: StalenessBound = UNBOUNDED) -> None:
        self._pool = pool
        self._staleness = staleness
        self._clients: dict[Namespace, MemoryClient] = {}
        self._making = threading.Lock()

    def client(self, namespace: Namespace) -> MemoryClient:
        """The client of ``namespace``; the same one for every version that reads it."""
        with self._making:
            client = self._clients.get(namespace)
            if client is None:
                client = MemoryClient(
                    self._pool,
                    namespace,
                    staleness=self._staleness,
                    read_timeout_s=READ_TIMEOUT_S,
                )
                self._clients[namespace] = client
            return client

    def rows_held(self, namespace: Namespace) -> int | None:
        """Rows of ``namespace`` on all shards; None when one of them does not answer."""
        stats = self.client(namespace).stats()
        return stats.rows if all(shard.held is not None for shard in stats.shards) else None

    def close(self) -> None:
        """Close every client; for processes that go on after serving."""
        with self._making:
            for client in self._clients.values():
                client.close()
            self._clients.clear()
