"""Reads some users over and over while something is done to the pool: does anybody notice?"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from cache_actors.pool.client import MemoryClient
from cache_actors.pool.shard_link import PoolInfo
from cache_actors.transfer.pool_memory import PoolMemory
from marm.addressing import NUM_BUCKETS
from marm.memory import Namespace

_PAUSE_S = 0.02
_ROWS_READ = 8

UsersOf = dict[Namespace, NDArray[np.int64]]


@dataclass(frozen=True)
class ProbeReport:
    """What the reads found; a user that has rows at first should have them all the while.

    Attributes:
        users: users that are read, all namespaces together.
        reads: rounds over all of them.
        hit_rate: share of reads of a user that found rows.
        lowest_hit_rate: in the worst round.
        failed_users: reads of a user whose shard did not answer.
    """

    users: int = 0
    reads: int = 0
    hit_rate: float | None = None
    lowest_hit_rate: float | None = None
    failed_users: int = 0


def sample_users(memory: PoolMemory, num_users: int) -> UsersOf:
    """Up to so many users with rows in every namespace of the pool, from all buckets."""
    sampled = {}
    for namespace in memory.namespaces() if num_users else []:
        known = [memory.users(namespace, bucket) for bucket in range(NUM_BUCKETS)]
        # The first of every bucket, then the second of every bucket, and so on.
        rank = np.concatenate([np.arange(len(users)) for users in known])
        users = np.concatenate(known)[np.argsort(rank, kind="stable")][:num_users]
        found = memory.client(namespace).fetch(users, 1, layers=0)
        sampled[namespace] = users[found.counts > 0]
    return sampled


class HitRateProbe:
    """Reads from a thread of its own between entering and leaving."""

    def __init__(self, pool: PoolInfo, users_of: UsersOf) -> None:
        self._pool = pool
        self._users_of = {name: users for name, users in users_of.items() if len(users)}
        self._rounds: list[float] = []
        self._failed = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="hit-rate-probe", daemon=True)

    @property
    def report(self) -> ProbeReport:
        """What was found so far."""
        users = sum(map(len, self._users_of.values()))
        if not self._rounds:
            return ProbeReport(users)
        mean, lowest = float(np.mean(self._rounds)), min(self._rounds)
        return ProbeReport(users, len(self._rounds), mean, lowest, self._failed)

    def __enter__(self) -> HitRateProbe:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _read(self) -> None:
        if not self._users_of:
            return
        with ExitStack() as stack:
            clients = [
                (stack.enter_context(MemoryClient(self._pool, namespace)), users)
                for namespace, users in self._users_of.items()
            ]
            while not self._stop.wait(_PAUSE_S):
                found = asked = 0
                for memory, users in clients:
                    rows, failed = memory.fetch_available(users, _ROWS_READ)
                    found += int((rows.counts > 0).sum())
                    asked += len(users)
                    self._failed += int(failed.sum())
                self._rounds.append(found / asked)
