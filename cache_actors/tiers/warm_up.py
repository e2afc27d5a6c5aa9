"""Filling a store that was lost with what the durable tier has, newest users first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.records import WORD_BYTES
from cache_actors.store.shard_store import ShardStore
from cache_actors.tiers.durable_tier import DurableTier, DurableTierUnavailableError
from marm.addressing import user_bucket
from marm.memory import Namespace, UserRows

_FREE_SHARE = 0.1
"""Stop short of the byte budget: new rows must find room without evicting what was just loaded."""

_USERS_PER_READ = 64


@dataclass(frozen=True)
class WarmUp:
    """What was loaded.

    Attributes:
        users, rows: restored.
        damaged_users: users whose block failed its check; the event log still has them.
        is_complete: whether the tier has no further users. Otherwise absent users have to be asked
            for there when they are missed.
    """

    users: int
    rows: int
    damaged_users: int
    is_complete: bool


def load_from_tier(
    store: ShardStore,
    tier: DurableTier,
    namespaces: Sequence[Namespace],
    buckets: Sequence[int],
) -> WarmUp:
    """Restore users of ``buckets`` until the store's byte budgets are nearly used up.

    Rows that are in the store already win over those of the tier, so saves may go on meanwhile, and
    repeating it changes nothing. Namespaces take turns.

    Raises:
        DurableTierUnavailableError: the tier does not answer; begin again when it does.
    """
    _load_forgotten(store, tier, buckets)
    waiting = {namespace: _slices(tier, namespace, buckets) for namespace in namespaces}
    users = rows = damaged_users = 0
    is_complete = True
    while waiting:
        for namespace, slices in list(waiting.items()):
            user_ids = next(slices, None)
            if user_ids is None:
                del waiting[namespace]
                continue
            found = tier.read(namespace, user_ids)
            if found.unavailable.any():
                raise DurableTierUnavailableError(
                    f"{int(found.unavailable.sum())} users could not be read from the durable "
                    "tier; begin again when it is back"
                )
            if not _has_room(store, namespace, found.rows):
                is_complete = False
                del waiting[namespace]
                continue
            store.restore(namespace, found.rows)
            users += int(np.count_nonzero(found.rows.counts))
            rows += len(found.rows.rows)
            damaged_users += int(found.damaged.sum())
    return WarmUp(users, rows, damaged_users, is_complete)


def _load_forgotten(store: ShardStore, tier: DurableTier, buckets: Sequence[int]) -> None:
    """Refuse what was forgotten before the store was lost, before anything is loaded."""
    forgotten = tier.forgotten()
    if not forgotten:
        return
    mine = np.isin(user_bucket(list(forgotten)), buckets).tolist()
    known = store.forgotten()
    for (user_id, until_ms), is_mine in zip(forgotten.items(), mine, strict=True):
        if is_mine and known.get(user_id) != until_ms:
            store.forget(user_id, until_ms)


def _slices(
    tier: DurableTier, namespace: Namespace, buckets: Sequence[int]
) -> Iterator[NDArray[np.int64]]:
    for user_ids in tier.scan(namespace, buckets):
        for start in range(0, len(user_ids), _USERS_PER_READ):
            yield user_ids[start : start + _USERS_PER_READ]


def _has_room(store: ShardStore, namespace: Namespace, rows: UserRows) -> bool:
    """Whether ``rows`` fit without evicting, and leave a share of the namespace's budget free."""
    room_bytes = store.room_bytes(namespace)
    if room_bytes is None:
        return True
    writer = store.open(namespace)
    stats = writer.stats()
    place_bytes = namespace.stored_dtype.itemsize + WORD_BYTES
    chunk_bytes = writer.allocator.chunk_rows * place_bytes
    growth_bytes = room_bytes // chunk_bytes * chunk_bytes
    free_bytes = stats.file_bytes - stats.counters.places * place_bytes + growth_bytes
    # A user's rows take up to twice their size: places come in powers of two.
    needed_bytes = 2 * len(rows.rows) * place_bytes
    return free_bytes - needed_bytes > _FREE_SHARE * (stats.file_bytes + growth_bytes)
