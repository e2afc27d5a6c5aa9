"""A shard's side of the durable tier: what it brings back from it, and what it leaves to it."""

from __future__ import annotations

import logging
import os
import queue
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.errors import MemoryStoreError
from cache_actors.store.limits import StoreLimits
from cache_actors.store.lookup import UserState
from cache_actors.store.shard_store import COLD_MARK, ShardStore
from cache_actors.tiers.durable_tier import DurableTierError, DurableTierUnavailableError
from cache_actors.tiers.redis_tier import RedisTier
from cache_actors.tiers.redis_url import RedisUrlError, parse_redis_url
from cache_actors.tiers.resync import leave_tier
from cache_actors.tiers.warm_up import load_from_tier
from cache_actors.tiers.write_behind import WriteBehind
from marm.memory import Namespace, UserRows

logger = logging.getLogger(__name__)

_WRITE_BEHIND_INTERVAL_S = 0.5
_MAX_WAITING = 10_000
_RETRY_S = 5.0


class ShardTier:
    """The durable tier of one replica, if the pool has one. Safe to use from several threads.

    A store that started empty is cold: users that are absent from it may be in the tier. It is
    warmed up from there, the users with the newest rows first, as far as its budget goes.
    """

    def __init__(
        self, store: ShardStore, redis_url: str | None, pool_name: str, limits: StoreLimits
    ) -> None:
        self._store = store
        self._pool_name = pool_name
        self._limits = limits
        self._tier: RedisTier | None = None
        self._behind: WriteBehind | None = None
        self._leading = threading.RLock()
        self._has_to_compare = False
        self._waiting: queue.Queue[tuple[Namespace, NDArray[np.int64]] | None]
        self._waiting = queue.Queue(_MAX_WAITING)
        self._stop = threading.Event()
        self._connect(redis_url)
        if self._tier is not None:
            if store.started_empty:
                self._cold_mark.touch()
            threading.Thread(target=self._run, name="memory-warm-up", daemon=True).start()

    @property
    def is_warm(self) -> bool:
        """Whether users that are absent here are absent from the tier too."""
        return self._tier is None or not self._cold_mark.exists()

    def backlog_users(self, namespace: Namespace) -> int:
        """Users whose newest change the tier does not have."""
        return 0 if self._tier is None else self._store.open(namespace).num_unsaved

    def recall(self, namespace: Namespace, user_ids: NDArray[np.int64]) -> None:
        """Bring users' rows back, so that the next lookup finds them."""
        if self._tier is not None and len(user_ids):
            self._store.restore(namespace, self._tier.get(namespace, user_ids))

    def absent_before(self, namespace: Namespace, user_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Users that a cold store does not know, before rows of theirs are saved."""
        if self.is_warm:
            return user_ids[:0]
        users = np.unique(user_ids)
        state = self._store.open(namespace).lookup(users, 0).state
        return users[state == UserState.ABSENT]

    def complete_later(self, namespace: Namespace, user_ids: NDArray[np.int64]) -> None:
        """Add the older rows that the tier may have of users that were saved for the first time."""
        if len(user_ids):
            try:
                self._waiting.put_nowait((namespace, user_ids))
            except queue.Full:
                logger.warning("too many users wait for their older rows; %d won't", len(user_ids))

    def forget(self, user_id: int, until_ms: int) -> None:
        """Remove a user's rows up to a time from the tier, for good.

        While it does not answer this raises `DurableTierUnavailableError`. It is done by itself
        when the tier is back; calling again then tells whether it was.
        """
        if self._tier is None:
            return
        try:
            self._tier.forget(user_id, until_ms)
        except DurableTierError as error:
            self.compare_later()  # a comparison brings what the store has forgotten to the tier
            raise DurableTierUnavailableError(
                f"user {user_id} is forgotten by the memory shard, but the durable tier does not "
                f"answer and still has what it had: {error}. It is removed there once the tier is "
                "back; forget the user again then to be sure"
            ) from error

    def drop(self, namespace: Namespace, buckets: NDArray[np.int64]) -> None:
        """Remove a namespace that was dropped here from the tier; raises while that does not
        answer, and may be repeated."""
        if self._tier is None:
            return
        with self._leading:
            leads = self._behind is not None
            self.lead(False)  # what is being put there must not come after this
            try:
                self._tier.drop(namespace, buckets.tolist())
            finally:
                self.lead(leads)

    def compare_later(self) -> None:
        """Have the whole store compared with the tier, now or after a restart: there are rows that
        no flag tells of, or the tier did not take something."""
        if self._tier is not None:
            leave_tier(self._store.directory)
            self._has_to_compare = True

    def compare_again(self) -> None:
        """Begin the comparison that `compare_later` asked for."""
        with self._leading:
            if self._has_to_compare and self._behind is not None:
                self._has_to_compare = False
                self._behind.compare_all()

    def lead(self, leads: bool) -> None:
        """Write behind if this replica takes the saves, else leave it to the one that does."""
        with self._leading:
            if self._tier is None or leads == (self._behind is not None):
                return
            if leads:
                self._behind = WriteBehind(self._store, self._tier, _WRITE_BEHIND_INTERVAL_S)
                self._behind.start()
            else:
                behind, self._behind = self._behind, None
                if behind is not None:
                    behind.close()

    def close(self) -> None:
        """Stop writing behind and give the connections back."""
        self._stop.set()
        self.lead(False)
        if self._tier is not None:
            self._tier.close()

    def _connect(self, redis_url: str | None) -> None:
        if redis_url is None:
            leave_tier(self._store.directory)
            return
        limits = self._limits
        self._tier = RedisTier.connect(
            redis_url, self._pool_name, limits.max_rows_per_user, limits.ttl_s
        )
        self._store.track_unsaved = True
        self._store.evict_to = self._evict_to  # a leader's write-behind takes this over

    def _evict_to(self, namespace: Namespace, rows: UserRows) -> None:
        if self._tier is not None:
            self._tier.put(namespace, rows)

    @property
    def _cold_mark(self) -> Path:
        return self._store.directory / COLD_MARK

    def _run(self) -> None:
        """Warm up if the store is cold; complete users that were saved meanwhile; for ever."""
        is_warmed = False
        while not self._stop.is_set():
            try:
                if not is_warmed and self._cold_mark.exists():
                    if self._warm_up():
                        self._cold_mark.unlink(missing_ok=True)
                    is_warmed = True
                item = self._waiting.get(timeout=_RETRY_S)
                if item is not None:
                    self.recall(*item)
            except queue.Empty:
                continue
            except (DurableTierError, MemoryStoreError, OSError) as error:
                logger.warning("could not bring rows back from the durable tier: %s", error)
                self._stop.wait(_RETRY_S)

    def _warm_up(self) -> bool:
        """Bring users back, the newest first; whether all of them fitted."""
        assert self._tier is not None
        buckets = np.flatnonzero(self._store.owned()).tolist()
        loaded = load_from_tier(self._store, self._tier, self._tier.namespaces(), buckets)
        logger.info("brought %d users back from the durable tier", loaded.users)
        return loaded.is_complete


def connect_tier(redis_url: str | None, pool_name: str) -> RedisTier | None:
    """The durable tier as a client reads it; None where this process cannot name it."""
    if redis_url is None:
        return None
    try:
        return RedisTier(parse_redis_url(redis_url, os.environ), pool_name)
    except RedisUrlError as error:
        logger.warning("reading without the durable tier: %s", error)
        return None
