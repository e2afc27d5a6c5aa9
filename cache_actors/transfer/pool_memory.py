"""A whole pool, all namespaces of it, as what a snapshot is taken of and restored into."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_actors.pool.changes import RowsRestored, take_users
from cache_actors.pool.client import MemoryClient
from cache_actors.pool.errors import MemoryUnavailable
from cache_actors.pool.leader_link import LeaderLink
from cache_actors.pool.placement import Placement, load_placement
from cache_actors.pool.shard_link import RETRY_PAUSE_S, PoolInfo
from cache_actors.store.lookup import ALL_ROWS
from cache_actors.store.namespace_writer import BucketMovedError
from marm.addressing import user_bucket
from marm.memory import Namespace, UserRows

_ATTEMPT_S, _DEADLINE_S = 30.0, 120.0
_USERS_PER_CHUNK = 256


class PoolMemory:
    """Calls that may concern every shard, repeated through restarts of shards, and following
    buckets that move. For use by one thread; close it, or use it as a context manager."""

    def __init__(self, pool: PoolInfo) -> None:
        self.pool = pool
        self._clients: dict[Namespace, MemoryClient] = {}
        self._links: dict[int, LeaderLink] = {}
        self._open = ExitStack()

    def namespaces(self) -> list[Namespace]:
        """Namespaces that any shard has, by name."""
        found = {
            namespace.name: namespace
            for shard in range(self._placement().num_shards)
            for namespace in self._ask(shard, "namespaces")
        }
        return [found[name] for name in sorted(found)]

    def client(self, namespace: Namespace) -> MemoryClient:
        """The client of one namespace; closed with the rest."""
        if namespace not in self._clients:
            self._clients[namespace] = self._open.enter_context(MemoryClient(self.pool, namespace))
        return self._clients[namespace]

    def users(self, namespace: Namespace, bucket: int) -> NDArray[np.int64]:
        """Users of a bucket that the pool knows."""
        found: NDArray[np.int64] = self._ask_owner(bucket, "users", namespace, bucket)
        return found

    def scan(self, namespace: Namespace, bucket: int) -> Iterator[UserRows]:
        """All users of a bucket with all their rows, some users at a time. Rows that were evicted
        are brought back from the durable tier."""
        users = self.users(namespace, bucket)
        for start in range(0, len(users), _USERS_PER_CHUNK):
            chunk = users[start : start + _USERS_PER_CHUNK]
            rows = self.client(namespace).fetch(chunk, ALL_ROWS)
            if len(rows.rows):
                yield rows

    def forgotten(self) -> dict[int, int]:
        """Users that asked to be forgotten, and until when (ms)."""
        found: dict[int, int] = {}
        for shard in range(self._placement().num_shards):
            for user, until_ms in self._ask(shard, "forgotten").items():
                found[user] = max(until_ms, found.get(user, until_ms))
        return found

    def forget(self, user_id: int, until_ms: int) -> None:
        """Remove a user's rows up to a time from every replica and tier, and refuse them from now
        on."""
        self._ask_owner(int(user_bucket(user_id)[0]), "forget", user_id, until_ms)

    def restore(self, namespace: Namespace, rows: UserRows) -> None:
        """Add rows, where what is stored already wins; acknowledged when it returns."""
        if self.pool.config.redis_url is not None:
            # What the durable tier has of evicted users is newer, and has to win too.
            self.client(namespace).fetch(rows.user_ids, ALL_ROWS)
        deadline = time.monotonic() + _DEADLINE_S
        left = rows
        while len(left.user_ids):
            missed = []
            for share in self._placement().split(left.user_ids):
                part = take_users(left, share.positions)
                try:
                    self._ask(share.shard, "receive", RowsRestored(namespace, part), False)
                except BucketMovedError:
                    missed.append(share.positions)
            left = take_users(left, np.concatenate([np.empty(0, np.int64), *missed]))
            self._wait_for_owner(bool(missed), deadline)

    def close(self) -> None:
        """Close the clients."""
        self._open.close()

    def __enter__(self) -> PoolMemory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _placement(self) -> Placement:
        return load_placement(self.pool.placement_path)

    def _ask(self, shard: int, method: str, *args: object) -> Any:
        if shard not in self._links:
            self._links[shard] = LeaderLink(self.pool, shard)
        link = self._links[shard]
        return link.call_until(method, *args, attempt_s=_ATTEMPT_S, deadline_s=_DEADLINE_S)

    def _ask_owner(self, bucket: int, method: str, *args: object) -> Any:
        """Ask the shard that owns a bucket, and the next one if it had just moved away."""
        deadline = time.monotonic() + _DEADLINE_S
        while True:
            owner = self._placement().shard_of_bucket[bucket]
            answer = self._ask(owner, method, *args)
            if self._ask(owner, "owned")[bucket]:
                return answer
            self._wait_for_owner(True, deadline)

    def _wait_for_owner(self, is_moving: bool, deadline: float) -> None:
        if not is_moving:
            return
        if time.monotonic() >= deadline:
            raise MemoryUnavailable(
                f"buckets of memory pool {self.pool.name!r} kept moving for {_DEADLINE_S:.0f} s; "
                "wait for the rebalance to end"
            )
        time.sleep(RETRY_PAUSE_S)
