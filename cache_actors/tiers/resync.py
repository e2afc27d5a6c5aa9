"""Comparing a whole store with a tier that may have lost what it acknowledged."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from cache_actors.atomic_files import replace_text
from cache_actors.store.shard_store import ShardStore
from cache_actors.tiers.durable_tier import DurableTier
from marm.addressing import NUM_BUCKETS
from marm.memory import Namespace, UserRows

_SESSION_FILE = "tier-session"


def leave_tier(directory: Path) -> None:
    """Note that a store is used without a durable tier: changes are no longer flagged, so a tier
    that it is given later has to be compared with all of it."""
    (directory / _SESSION_FILE).unlink(missing_ok=True)


class Resync:
    """Puts every user of a store, a few at a time, whenever the tier may not have them.

    The tier keeps, per store, the identity (the runs of its servers) for which everything not
    flagged in the store is known to be there. A tier that was emptied lacks the note; one that was
    started again, from a file or from a replica, has another identity. A put of what is there
    already reads a few bytes, so comparing is cheap next to sending.
    """

    def __init__(
        self,
        store: ShardStore,
        tier: DurableTier,
        users_per_step: int,
        putting: AbstractContextManager[object],
    ) -> None:
        """``putting`` is held from reading rows until they are put."""
        self._store = store
        self._putting = putting
        self._tier = tier
        self._users_per_step = users_per_step
        self._store_id = self._read_store_id()
        self._compared: tuple[str, str] | None = None
        self._left: Iterator[int] | None = None
        self.steps_left = 0

    def step(self) -> bool:
        """Compare some more users; whether all of the store is known to be in the tier.

        Raises:
            DurableTierError: the tier can't be asked now. The comparison goes on where it was.
        """
        store_id, identity = self._store_id, self._tier.identity()
        if self._tier.synced_identity(store_id) == identity:
            self._left = None
            self.steps_left = 0
            return True
        if self._left is None or self._compared != (store_id, identity):
            self._compared = store_id, identity
            self._left = self._put_all()
        num_users = 0
        try:
            for put in self._left:
                num_users += put
                if num_users >= self._users_per_step:
                    return False
        except BaseException:
            # A generator that raised is over: begin again, what was put is skipped quickly.
            self._left = None
            raise
        self._tier.set_synced(store_id, identity)
        self._left = None
        return self._tier.identity() == identity and self._store_id == store_id

    def begin_anew(self) -> None:
        """Compare all of the store again, also if the process ends before it is done."""
        leave_tier(self._store.directory)
        self._store_id = self._read_store_id()

    def _read_store_id(self) -> str:
        return f"{self._store.generation}:{_session(self._store.directory)}"

    def _put_all(self) -> Iterator[int]:
        """Put all users, yielding how many each time."""
        namespaces = self._store.namespaces()
        self.steps_left = len(namespaces) * NUM_BUCKETS
        for user_id, until_ms in self._store.forgotten().items():
            self._tier.forget(user_id, until_ms)
            yield 1
        for namespace in namespaces:
            for bucket in range(NUM_BUCKETS):
                if namespace not in self._store.namespaces():  # opening would make it again
                    self.steps_left -= NUM_BUCKETS - bucket
                    break
                chunks = self._store.open(namespace).scan(bucket)
                while num_users := self._put_next(namespace, chunks):
                    yield num_users
                self.steps_left -= 1

    def _put_next(self, namespace: Namespace, chunks: Iterator[UserRows]) -> int:
        with self._putting:
            rows = next(chunks, None)
            if rows is None:
                return 0
            self._tier.put(namespace, rows)
        return len(rows.user_ids)


def _session(directory: Path) -> str:
    """Name of the time since when all changes of a store are flagged."""
    path = directory / _SESSION_FILE
    if not path.exists():
        replace_text(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8")
