"""Reads some users over and over while something is done to the pool: does anybody notice?"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from cache_actors.pool.client import MemoryClient
from cache_actors.pool.operations import namespaces_of
from cache_actors.pool.shard_link import PoolInfo
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


def sample_users(pool: PoolInfo, num_users: int) -> UsersOf:
    """Up to so many users with rows in every namespace of the pool, from all buckets."""
    sampled = {}
    for namespace in namespaces_of(pool):
        with MemoryClient(pool, namespace) as memory:
            users = list(islice(_users(memory, -(-num_users // NUM_BUCKETS)), num_users))
        sampled[namespace] = np.array(users, np.int64)
    return sampled


def _users(memory: MemoryClient, per_bucket: int) -> Iterator[int]:
    for bucket in range(NUM_BUCKETS if per_bucket else 0):
        for rows in islice(memory.scan(bucket), 1):
            yield from rows.user_ids[rows.counts > 0][:per_bucket].tolist()


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
