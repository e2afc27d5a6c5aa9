"""The store of one shard: every namespace in one directory, with one writer and many readers.

    data.mdb, lock.mdb             LMDB: the index of every namespace, and facts
    <namespace>-<number>.rows      rows, and
    <namespace>-<number>.checks    their check words
    running                        the machine's boot in which rows may not have reached the disk
    writer.lock                    held by the one writer

Readers in other processes map the same files, so a read is a copy out of the page cache that waits
for nobody. A save is one transaction. Rows survive the death of every process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import struct
import threading
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.errors import MemoryStoreError, NamespaceMismatchError
from cache_actors.store.limits import UNLIMITED, Durability, StoreLimits
from cache_actors.store.lmdb_environment import MAX_MAP_BYTES, open_environment
from cache_actors.store.lookup import ALL_ROWS, UserState
from cache_actors.store.mapped_shard import FORMAT_KEY, STORE_FORMAT, generation_of
from cache_actors.store.namespace_store import StoreStats
from cache_actors.store.namespace_writer import NamespaceWriter
from cache_actors.store.rules import ReadRules
from cache_actors.store.running_mark import RunningMark
from cache_actors.store.writer_lock import WriterLock
from marm.addressing import NUM_BUCKETS
from marm.memory import Namespace, UserRows

logger = logging.getLogger(__name__)

COLD_MARK = "cold"
"""A file beside the store that says that the durable tier may have users that are absent here."""

_MIN_INDEX_BYTES, _INDEX_SHARE = 1 << 20, 8
_SAVES_PER_INDEX_CHECK = 16
_UNTIL = struct.Struct("<q")
_USER = struct.Struct(">q")
_USERS_PER_STEP = 1024


@dataclass(frozen=True)
class ShardStoreStats:
    """What a shard holds, by namespace name."""

    generation: str
    namespaces: dict[str, StoreStats]
    index_bytes: int
    forgotten_users: int

    @property
    def file_bytes(self) -> int:
        """Bytes of all files."""
        return self.index_bytes + sum(held.file_bytes for held in self.namespaces.values())


class ShardStore:
    """The one writer of a shard. Safe to use from several threads; writes take turns.

    Args:
        directory: made if missing. Files in it that are not the store's are left alone.
        limits: bounds; may be others than when the store was made.
        durability: what an acknowledged save survives.
        owned: buckets of a new store, ``[256]``; None for all. A store that exists keeps its own.

    Attributes:
        track_unsaved: whether saves mark users for the write-behind to a durable tier.
        evict_to: takes users that the durable tier does not have yet, before they are evicted;
            raises if it can't.
        started_empty: nothing was here, so absent users may still be in the durable tier.
    """

    def __init__(
        self,
        directory: Path,
        *,
        limits: StoreLimits = UNLIMITED,
        durability: Durability = "process",
        owned: NDArray[np.bool_] | None = None,
    ) -> None:
        self.directory = directory
        self.limits = limits
        self.track_unsaved = False
        self.evict_to: Callable[[Namespace, UserRows], None] | None = None
        self._is_closed = False
        self._num_saves = 0
        self._syncs = durability == "machine"
        self._stores: dict[Namespace, NamespaceWriter] = {}
        self._lock = threading.RLock()
        directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo:
            self._writer_lock = WriterLock(directory / "writer.lock")
            undo.callback(self._writer_lock.release)
            self._mark = RunningMark(directory / "running", is_needed=not self._syncs)
            if self._mark.is_of_earlier_boot():
                logger.warning("machine went down with unwritten rows of %s: dropped", directory)
                _delete_store(directory)
            self._env = open_environment(
                directory,
                readonly=False,
                sync=self._syncs,
                max_map_bytes=limits.max_bytes or MAX_MAP_BYTES,
            )
            undo.callback(self._env.close)
            self._start(owned)
            undo.pop_all()

    def _start(self, owned: NDArray[np.bool_] | None) -> None:
        if not self._env.is_empty_or_has(b"facts"):
            raise MemoryStoreError(
                f"{self.directory} holds an LMDB database that is no memory store; nothing of it "
                "was changed. Use another directory"
            )
        self._mark.set()
        self._facts = self._env.table(b"facts")
        self._forgotten_table = self._env.table(b"forgotten")
        stored = self._fact(FORMAT_KEY)
        self.started_empty = stored is None
        if stored is None:
            fact = {"format": STORE_FORMAT, "generation": uuid.uuid4().hex}
            stored = json.dumps(fact).encode()
            buckets = np.ones(NUM_BUCKETS, np.bool_) if owned is None else owned
            self._put_facts({FORMAT_KEY: stored, b"owned": np.packbits(buckets).tobytes()})
        self.generation = generation_of(stored, self.directory)
        packed = self._fact(b"owned")
        assert packed is not None
        self._owned = np.unpackbits(np.frombuffer(packed, np.uint8)).astype(np.bool_)
        self.forgotten_until = self._env.read(self._read_forgotten)
        for namespace in self.namespaces():
            self.open(namespace)
        self._write_rules()

    def namespaces(self) -> list[Namespace]:
        """Namespaces that the store holds."""
        return [
            Namespace(**json.loads(fact)["namespace"])
            for fact in self._env.read(self._read_namespaces)
        ]

    def open(self, namespace: Namespace) -> NamespaceWriter:
        """The store of ``namespace``, made where it is missing."""
        store = self._stores.get(namespace)
        if store is not None:
            return store
        with self._lock:
            if namespace not in self._stores:
                name = namespace.name.encode()
                stored = self._fact(b"namespace/" + name)
                if stored is None:
                    fact = json.dumps({"namespace": asdict(namespace)}).encode()
                    rules = self._rules(0)
                    self._put_facts({b"namespace/" + name: fact, b"rules/" + name: rules.pack()})
                elif json.loads(stored)["namespace"] != asdict(namespace):
                    raise NamespaceMismatchError.of(
                        f"store {self.directory}", namespace, json.loads(stored)["namespace"]
                    )
                self._stores[namespace] = NamespaceWriter(
                    self._env, self.directory, namespace, self
                )
            return self._stores[namespace]

    def save(
        self, namespace: Namespace, user_ids: NDArray[np.int64], rows: NDArray[np.void]
    ) -> None:
        """See `NamespaceWriter.save`."""
        with self._lock:
            self.open(namespace).save(user_ids, rows)
            self._num_saves += 1
            if self.limits.max_bytes and self._num_saves % _SAVES_PER_INDEX_CHECK == 0:
                self._bound_index(self._index_share(self.limits.max_bytes))

    def restore(self, namespace: Namespace, rows: UserRows) -> None:
        """See `NamespaceWriter.restore`."""
        with self._lock:
            self.open(namespace).restore(rows)

    def mark_saved(
        self, namespace: Namespace, user_ids: NDArray[np.int64], versions: NDArray[np.uint32]
    ) -> None:
        """See `NamespaceWriter.mark_saved`."""
        with self._lock:
            self.open(namespace).mark_saved(user_ids, versions)

    def evict(self, namespace: Namespace, user_ids: NDArray[np.int64]) -> int:
        """See `NamespaceWriter.evict`."""
        with self._lock:
            return self.open(namespace).evict(user_ids)

    def repair(self, namespace: Namespace, user_ids: NDArray[np.int64]) -> int:
        """See `NamespaceWriter.repair`."""
        with self._lock:
            return self.open(namespace).repair(user_ids)

    def touch(self, namespace: Namespace, user_ids: Iterable[int]) -> None:
        """Readers used these users, so that others are evicted before them."""
        with self._lock:
            self.open(namespace).recency.touch(user_ids)

    def drop(self, namespace: Namespace) -> None:
        """Delete a namespace; its name may be used again."""
        with self._lock:
            self._mark.set()
            self.open(namespace).drop()

    def owned(self) -> NDArray[np.bool_]:
        """Buckets that the shard owns, ``[256]``."""
        return self._owned

    def own(self, buckets: Iterable[int]) -> None:
        """Take buckets over; readers and writers see it at once."""
        self._set_owned(buckets, True)

    def disown(self, buckets: Iterable[int]) -> None:
        """Give buckets up: saves are refused and readers sent elsewhere. Rows stay until
        `delete_bucket`."""
        self._set_owned(buckets, False)

    def delete_bucket(self, bucket: int) -> int:
        """Remove the users of a bucket from every namespace; how many there were. What was
        forgotten stays forgotten here, should the bucket come back."""
        removed = 0
        for store in list(self._stores.values()):
            users = store.users(bucket)
            for start in range(0, len(users), _USERS_PER_STEP):
                with self._lock:
                    removed += store.remove(users[start : start + _USERS_PER_STEP])
        return removed

    def forget(self, user_id: int, until_ms: int) -> int:
        """Remove a user's rows up to a time everywhere here, and refuse them from now on; how many
        there were."""
        with self._lock:
            until_ms = max(until_ms, self.forgotten_until.get(user_id, until_ms))
            key, value = _USER.pack(user_id), _UNTIL.pack(until_ms)
            self._mark.set()
            self._env.write(lambda t: t.put(key, value, db=self._forgotten_table))
            self.forgotten_until[user_id] = until_ms
            return sum(store.forget(user_id, until_ms) for store in self._stores.values())

    def forgotten(self) -> dict[int, int]:
        """Users that asked to be forgotten, and until when (ms)."""
        return dict(self.forgotten_until)

    def expire(self, now_s: int) -> int:
        """Remove users to whom nothing was written within the time to live; how many."""
        with self._lock:
            return sum(store.expire(now_s) for store in self._stores.values())

    def verify(self, namespace: Namespace, bucket: int) -> int:
        """Check every row of a bucket and drop damaged ones; how many."""
        store = self.open(namespace)
        users = store.users(bucket)
        dropped = 0
        for start in range(0, len(users), _USERS_PER_STEP):
            part = users[start : start + _USERS_PER_STEP]
            damaged = part[store.lookup(part, ALL_ROWS).state == UserState.DAMAGED]
            if len(damaged):
                dropped += self.repair(namespace, damaged)
        return dropped

    def room_bytes(self, namespace: Namespace) -> int | None:
        """Bytes by which the row file of a namespace may grow; None without bound."""
        own = self._stores[namespace].file_bytes if namespace in self._stores else 0
        bounds = []
        quota = self.limits.quota(namespace.name)
        if quota is not None:
            bounds.append(quota - own)
        if self.limits.max_bytes is not None:
            files = sum(store.file_bytes for store in self._stores.values())
            index = self._index_bytes()
            index += max(_MIN_INDEX_BYTES, index // 4)  # readers may hold pages for a while
            index = max(index, self._index_share(self.limits.max_bytes))
            bounds.append(self.limits.max_bytes - files - index)
        return max(0, min(bounds)) if bounds else None

    def before_commit(self) -> None:
        """Called after rows were written and before the index names them."""
        self._mark.set()
        if self._syncs:
            for store in self._stores.values():
                store.flush()

    def flush(self) -> None:
        """Make every saved row survive a crash of the machine too."""
        with self._lock:
            for store in self._stores.values():
                store.flush()
            self._env.flush()
            self._mark.clear()

    def stats(self) -> ShardStoreStats:
        """What the shard holds."""
        held = {namespace.name: store.stats() for namespace, store in list(self._stores.items())}
        return ShardStoreStats(
            self.generation, held, self._index_bytes(), len(self.forgotten_until)
        )

    def close(self) -> None:
        """Flush and close every store. Closing again does nothing."""
        with self._lock:
            if self._is_closed:
                return
            self.flush()
            self._is_closed = True
            while self._stores:
                self._stores.popitem()[1].close()
            self._env.close()
            self._writer_lock.release()

    def _index_share(self, max_bytes: int) -> int:
        """Bytes of the budget that row files leave to the index."""
        return max(_MIN_INDEX_BYTES, max_bytes // _INDEX_SHARE)

    def _bound_index(self, share: int) -> None:
        """Forget who was evicted, and then evict more users, before the index outgrows its share.
        From then on the durable tier has to be asked for users that are absent here."""
        stores = list(self._stores.values())
        while sum(store.index_bytes for store in stores) > share * 3 // 4:
            if self.track_unsaved:
                (self.directory / COLD_MARK).touch()
            if not sum(store.drop_evicted_records() for store in stores):
                largest = max(stores, key=lambda store: store.index_bytes)
                if not largest.evict_some(_USERS_PER_STEP):
                    return

    def _index_bytes(self) -> int:
        return (self.directory / "data.mdb").stat().st_size

    def _set_owned(self, buckets: Iterable[int], value: bool) -> None:
        with self._lock:
            owned = self._owned.copy()
            owned[list(buckets)] = value
            self._owned = owned
            self._write_rules()

    def _rules(self, file_number: int) -> ReadRules:
        ttl_s = None if self.limits.ttl_s is None else int(self.limits.ttl_s)
        return ReadRules(self._owned, self.limits.max_rows_per_user, ttl_s, file_number)

    def _write_rules(self) -> None:
        """Tell readers of every namespace, in one transaction."""
        facts = {b"owned": np.packbits(self._owned).tobytes()}
        for namespace, store in self._stores.items():
            facts[b"rules/" + namespace.name.encode()] = self._rules(store.file_number).pack()
        self._put_facts(facts)

    def _fact(self, key: bytes) -> bytes | None:
        def read(transaction: Any) -> bytes | None:
            stored = transaction.get(key, None, self._facts)
            return None if stored is None else bytes(stored)

        return self._env.read(read)

    def _put_facts(self, facts: dict[bytes, bytes]) -> None:
        def put(transaction: Any) -> None:
            for key, value in facts.items():
                transaction.put(key, value, db=self._facts)

        self._mark.set()
        self._env.write(put)

    def _read_namespaces(self, transaction: Any) -> list[bytes]:
        cursor = transaction.cursor(self._facts)
        found: list[bytes] = []
        if cursor.set_range(b"namespace/"):
            for key, value in cursor.iternext():
                if not bytes(key).startswith(b"namespace/"):
                    break
                found.append(bytes(value))
        return found

    def _read_forgotten(self, transaction: Any) -> dict[int, int]:
        return {
            _USER.unpack(key)[0]: _UNTIL.unpack(value)[0]
            for key, value in transaction.cursor(self._forgotten_table).iternext()
        }


def _delete_store(directory: Path) -> None:
    for pattern in ("data.mdb", "lock.mdb", "*.rows", "*.checks", "running"):
        for path in directory.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
