"""Copying buckets from one live store to another while saves go on.

The source does three things in one thread: it takes saves, forwards each of them to the target
before it is acknowledged, and between two saves copies the next few users. So what is copied is
never older than what was forwarded before, and the target ends up equal however the two mix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache_actors.pool.changes import Change, LeftToTier, NamespaceOpened, RowsSaved, UsersForgotten
from cache_actors.store.lookup import ALL_ROWS, UserState
from cache_actors.store.shard_store import ShardStore
from marm.addressing import NUM_BUCKETS
from marm.memory import Namespace

_CHUNK_BYTES = 4 << 20
_FIRST_CHUNK_USERS = 64
_MAX_CHUNK_USERS = 4096

Send = Callable[[Change], None]
Repair = Callable[[Namespace, NDArray[np.int64]], None]
"""Drop damaged rows of users and bring back what another member has; the rest counts as evicted."""

Recall = Callable[[Namespace, NDArray[np.int64]], None]
"""Bring back rows of users that were evicted to the durable tier."""


@dataclass(frozen=True)
class CopyProgress:
    """What one step of a handover copied, and whether nothing is left to copy."""

    users: int
    rows: int
    is_done: bool


class Handover:
    """The source's side of one copy. Used by one thread at a time."""

    def __init__(
        self,
        store: ShardStore,
        buckets: NDArray[np.int64],
        send: Send,
        repair: Repair,
        recall: Recall,
    ) -> None:
        self._store = store
        self.send = send
        self._repair = repair
        self._recall = recall
        self._buckets = np.zeros(NUM_BUCKETS, np.bool_)
        self._buckets[buckets] = True
        self._left = [(namespace, b) for namespace in store.namespaces() for b in buckets.tolist()]
        self._users = np.empty(0, np.int64)
        self._chunk_users = _FIRST_CHUNK_USERS
        for namespace in store.namespaces():
            self.send(NamespaceOpened(namespace))
        self.forward(UsersForgotten(store.forgotten()))

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to copy."""
        return not self._left and not len(self._users)

    @property
    def buckets(self) -> NDArray[np.int64]:
        """The buckets that are copied."""
        return np.flatnonzero(self._buckets)

    def forward(self, change: Change) -> None:
        """Pass a change on that the source has just made."""
        part = change.within(self._buckets)
        if part is not None:
            self.send(part)

    def copy_next(self) -> CopyProgress:
        """Copy the next few users; raises if the target does not take them."""
        while not len(self._users):
            if not self._left:
                return CopyProgress(0, 0, is_done=True)
            self._namespace, bucket = self._left.pop()
            self._users = self._store.open(self._namespace).users(bucket)
        user_ids = self._users[: self._chunk_users]
        num_rows = self._copy(user_ids)
        self._users = self._users[len(user_ids) :]
        return CopyProgress(len(user_ids), num_rows, self.is_done)

    def _copy(self, user_ids: NDArray[np.int64]) -> int:
        store = self._store.open(self._namespace)
        found = store.lookup(user_ids, ALL_ROWS)
        damaged = found.state == UserState.DAMAGED
        if damaged.any():  # the target would take its sound rows for all there are
            self._repair(self._namespace, user_ids[damaged])
            found = store.lookup(user_ids, ALL_ROWS)
        evicted = found.state == UserState.EVICTED
        in_part = evicted & (found.rows.counts > 0)
        if (evicted & ~in_part).any():
            self.send(LeftToTier())
        if in_part.any():
            self._recall(self._namespace, user_ids[in_part])
            found = store.lookup(user_ids, ALL_ROWS)
        rows = found.rows
        if len(rows.rows):
            owners = np.repeat(user_ids, rows.counts)
            self.send(RowsSaved(self._namespace, owners, rows.rows))
            bytes_per_user = max(1, rows.rows.nbytes // len(user_ids))
            self._chunk_users = int(np.clip(_CHUNK_BYTES // bytes_per_user, 1, _MAX_CHUNK_USERS))
        return len(rows.rows)
