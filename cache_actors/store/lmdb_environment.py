"""One LMDB environment per directory and process, with a map that grows.

LMDB forbids opening a directory twice in a process (closing one copy drops the locks of the other)
and changing the size of the map while a transaction of the process is open. Everything that must
know these rules is here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from cache_actors.store.errors import (
    MemoryFullError,
    MemoryStoreAbsentError,
    MemoryStoreError,
)

Result = TypeVar("Result")
FileIdentity = tuple[int, int]

MAX_READERS = 1024
"""Reading processes and threads that may use one store at a time."""

MAX_TABLES = 256
MAP_BYTES = 1 << 28
MAX_MAP_BYTES = 1 << 42


class _MapGate:
    """Lets transactions run together, and a change of the map size run alone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # taken directly where it costs: a condition is slower
        self._changed = threading.Condition(self._lock)
        self._users = 0
        self._closing = False

    def enter(self) -> None:
        with self._lock:
            while self._closing:
                self._changed.wait()
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._closing and not self._users:
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            while self._closing:
                self._changed.wait()
            self._closing = True
            while self._users:
                self._changed.wait()
        try:
            yield
        finally:
            with self._changed:
                self._closing = False
                self._changed.notify_all()


class LmdbEnvironment:
    """An open directory, shared by everything in this process that uses it."""

    def __init__(self, path: Path, env: Any, max_map_bytes: int) -> None:
        self.path = path
        self.env = env
        self.max_map_bytes = max_map_bytes
        self.references = 1
        self._gate = _MapGate()
        self._write_lock = threading.Lock()
        self.readonly: bool = env.flags()["readonly"]
        self._tables: dict[bytes, Any] = {}

    def table(self, name: bytes) -> Any:
        """A named table, made where it is missing; a reader raises `MemoryStoreAbsentError`."""
        found = self._tables.get(name)
        if found is None:
            with self._write_lock:  # opening is a write transaction of its own
                found = self._tables.get(name) or self._open_table(name)
                self._tables[name] = found
        return found

    def _open_table(self, name: bytes) -> Any:
        while True:
            self._gate.enter()
            try:
                return self.env.open_db(name, create=not self.readonly)
            except lmdb.MapResizedError:
                pass
            except (lmdb.NotFoundError, lmdb.ReadonlyError) as error:
                raise MemoryStoreAbsentError(
                    f"store {self.path} has no {name.decode()!r} yet; let its writer make it first"
                ) from error
            finally:
                self._gate.leave()
            with self._gate.alone():
                self.env.set_mapsize(0)

    def is_empty_or_has(self, table: bytes) -> bool:
        """Whether nobody else's data is here: a store makes ``table`` before anything else."""

        def look(transaction: Any) -> bool:
            return not transaction.stat()["entries"] or transaction.cursor().set_key(table)

        return self.read(look)

    def forget_table(self, name: bytes) -> None:
        """Forget the handle of a table that is about to be dropped."""
        self._tables.pop(name, None)

    def read(self, work: Callable[[Any], Result]) -> Result:
        """``work(transaction)`` on a consistent snapshot. Buffers it sees end with it."""
        while True:
            try:
                self._gate.enter()
                try:
                    with self.env.begin(buffers=True) as transaction:
                        return work(transaction)
                finally:
                    self._gate.leave()
            except lmdb.MapResizedError:  # another process grew the store
                with self._gate.alone():
                    self.env.set_mapsize(0)
            except lmdb.CorruptedError as error:
                raise self._damaged(error) from error
            except lmdb.Error as error:
                raise MemoryStoreError(
                    f"store {self.path} cannot be read: {error}; at most {MAX_READERS} reads may "
                    "run on one store at a time"
                ) from error

    def write(self, work: Callable[[Any], Result]) -> Result:
        """``work(transaction)``, committed as a whole or not at all.

        Buffers it reads end with its first change. The work is repeated when the map has to grow.
        """
        with self._write_lock:
            while True:
                try:
                    self._gate.enter()
                    try:
                        with self.env.begin(write=True, buffers=True) as transaction:
                            return work(transaction)
                    finally:
                        self._gate.leave()
                except lmdb.MapFullError:
                    self._grow()
                except lmdb.MapResizedError:
                    with self._gate.alone():
                        self.env.set_mapsize(0)
                except lmdb.CorruptedError as error:
                    raise self._damaged(error) from error
                except lmdb.Error as error:
                    raise MemoryFullError(
                        f"rows could not be stored in {self.path}: {error}; nothing of this batch "
                        "was stored. Check free space and permissions there, then save again"
                    ) from error

    def oldest_reader(self) -> int | None:
        """The oldest transaction that any process still reads; None when nobody reads."""
        ids = [line.rsplit(None, 1)[-1] for line in self.env.readers().splitlines()[1:]]
        return min((int(found) for found in ids if found.isdigit()), default=None)

    def forget_dead_readers(self) -> None:
        """Free the places of readers that were killed; old pages could never be reused else."""
        self.env.reader_check()

    def flush(self) -> None:
        """Write every commit through to the disk."""
        self.env.sync(True)

    def close(self) -> None:
        """Give back one reference; the last one closes the directory."""
        with _registry_lock:
            self.references -= 1
            if self.references:
                return
            for key in [key for key, opened in _registry.items() if opened is self]:
                del _registry[key]
        with self._gate.alone():
            self.env.close()

    def _grow(self) -> None:
        with self._gate.alone():
            size = self.env.info()["map_size"]
            if size >= self.max_map_bytes:
                raise MemoryFullError(
                    f"index {self.path} reached its limit of {self.max_map_bytes} bytes; raise "
                    "max_map_bytes, lower max_rows_per_user or add shards"
                )
            self.env.set_mapsize(min(2 * size, self.max_map_bytes))

    def _damaged(self, error: Exception) -> MemoryStoreError:
        return MemoryStoreError(
            f"store {self.path} is damaged ({error}); delete that directory and replay the event "
            "log to rebuild its rows"
        )


# LMDB's rule of one environment per directory and process makes this table unavoidable.
_registry: dict[FileIdentity | None, LmdbEnvironment] = {}
_registry_lock = threading.Lock()


def open_environment(
    path: Path,
    readonly: bool,
    *,
    sync: bool = False,
    map_bytes: int = MAP_BYTES,
    max_map_bytes: int = MAX_MAP_BYTES,
) -> LmdbEnvironment:
    """The environment of directory ``path``; a reader shares the writer of its own process."""
    path = path.resolve()
    with _registry_lock:
        shared = _registry.get(_identity(path))
        if shared is not None:
            if shared.readonly and not readonly:
                raise MemoryStoreError(
                    f"store {path} is open for reading in this process, so it cannot be opened for "
                    "writing; close the reader first"
                )
            shared.references += 1
            return shared
        if readonly and not (path / "data.mdb").exists():
            raise MemoryStoreAbsentError(
                f"no memory store at {path}; start the pool and open the namespace first"
            )
        if not readonly:
            path.mkdir(parents=True, exist_ok=True)
        try:
            # Without sync an acknowledged commit survives the death of the process (the kernel
            # holds it), not of the machine: after that the event log rebuilds the rows.
            env = lmdb.open(
                str(path),
                map_size=map_bytes,
                readonly=readonly,
                sync=sync,
                metasync=sync,
                max_readers=MAX_READERS,
                max_dbs=MAX_TABLES,
            )
            try:
                opened = LmdbEnvironment(path, env, max_map_bytes)
            except BaseException:
                env.close()
                raise
        except lmdb.NotFoundError as error:
            raise MemoryStoreAbsentError(
                f"store {path} is not initialised yet; let its writer open it first"
            ) from error
        except (lmdb.Error, OSError) as error:
            raise MemoryStoreError(
                f"store {path} cannot be opened: {error}; check permissions and free space, or "
                "delete that directory and replay the event log"
            ) from error
        _registry[_identity(path)] = opened
        return opened


def _identity(path: Path) -> FileIdentity | None:
    """What LMDB means by the same directory: the same file, also after it was replaced."""
    try:
        found = (path / "data.mdb").stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
