"""What is left of the acknowledged rows: by a client, and in the files of every replica."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from benchmarks.perf.faults.ledger import Comparison, Ledger
from cache_actors.pool.client import MemoryClient
from cache_actors.pool.placement import load_placement
from cache_actors.pool.shard_info import ShardInfo
from cache_actors.pool.shard_link import PoolInfo
from cache_actors.store.mapped_shard import MappedShard
from marm.memory import Namespace, UserRows

_USERS_PER_READ = 64

Fetch = Callable[[NDArray[np.int64], int], UserRows]


def audit_client(client: MemoryClient, ledger: Ledger) -> Comparison:
    """Every acknowledged row, read the way an application does."""
    return _compare_all(client.namespace, client.fetch, ledger, np.arange(len(ledger.users)))


def audit_replica(
    pool: PoolInfo, namespace: Namespace, info: ShardInfo, ledger: Ledger
) -> Comparison:
    """Every acknowledged row of a shard, read from the files of one of its replicas."""
    shares = load_placement(pool.placement_path).split(ledger.users)
    users = np.concatenate([s.positions for s in shares if s.shard == info.shard])
    shard = MappedShard(info.path)
    try:
        return _compare_all(namespace, shard.open(namespace).fetch, ledger, users)
    finally:
        shard.close()


def _compare_all(
    namespace: Namespace, fetch: Fetch, ledger: Ledger, users: NDArray[np.int64]
) -> Comparison:
    expected = found = wrong = 0
    for start in range(0, len(users), _USERS_PER_READ):
        part = users[start : start + _USERS_PER_READ]
        promised = ledger.promised(part)
        rows = fetch(ledger.users[part], ledger.rows_per_user)
        compared = ledger.compare(namespace, part, promised, rows, ledger.rows_per_user)
        expected += compared.expected_rows
        found += compared.found_rows
        wrong += compared.wrong_rows
    return Comparison(expected, found, wrong)
