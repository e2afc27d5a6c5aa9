"""The one writer of the stores that are read in a measurement, in a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from benchmarks.perf.stored_rows import RowMaker, user_ids
from cache_actors.store.shard_store import ShardStore
from marm.memory import Namespace

_ANSWER_TIMEOUT_S = 300.0
_EXIT_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class FillStore:
    """Make a store in which every user has the same number of rows.

    Rows come as training writes them: ``rows_per_visit`` rows of every user, then the next of every
    user and so on, in saves of ``rows_per_save``.
    """

    directory: Path
    namespace: Namespace
    num_users: int
    rows_per_user: int
    rows_per_save: int = 1024
    rows_per_visit: int = 1


@dataclass(frozen=True)
class Append:
    """Go on appending rows of random users to a store, at a steady rate, until told to stop."""

    directory: Path
    rows_per_save: int
    saves_per_s: float
    seed: int


@dataclass(frozen=True)
class StopAppending:
    """End an `Append`; the answer is what it did."""


@dataclass(frozen=True)
class Appended:
    """What was appended, and how long a save took."""

    rows: int
    rows_per_s: float
    save_p50_ms: float


class StoreProcess:
    """Sends commands to the writer. Each is answered when it is done."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def fill(self, command: FillStore) -> float:
        """Returns rows/s of the saves."""
        rate = self._call(command)
        if not isinstance(rate, float):
            raise TypeError(f"expected the rate of a fill, got {rate!r}")
        return rate

    @contextmanager
    def appending(self, command: Append) -> Iterator[list[Appended]]:
        """Rows are being appended meanwhile; what was done is in the list afterwards."""
        done: list[Appended] = []
        self._call(command)
        try:
            yield done
        finally:
            appended = self._call(StopAppending())
            if isinstance(appended, Appended):
                done.append(appended)

    def _call(self, command: object) -> object:
        self._connection.send(command)
        if not self._connection.poll(_ANSWER_TIMEOUT_S):
            raise TimeoutError(f"the writer did not answer {command!r}")
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextmanager
def store_process() -> Iterator[StoreProcess]:
    """A running writer; it closes its stores and ends with the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), name="store-writer", daemon=True)
    process.start()
    theirs.close()
    try:
        yield StoreProcess(ours)
    finally:
        ours.close()  # the writer ends when its pipe does
        process.join(_EXIT_TIMEOUT_S)
        if process.is_alive():
            process.kill()
            process.join()


class _OpenStore:
    """A store, and how many rows each of its users has."""

    def __init__(self, command: FillStore) -> None:
        self.shard = ShardStore(command.directory)
        self.store = self.shard.open(command.namespace)
        self.users = user_ids(command.num_users)
        self.counts = np.zeros(command.num_users, np.int64)
        self._maker = RowMaker(command.namespace)

    def fill(self, command: FillStore) -> float:
        num_users, at_once = len(self.users), command.rows_per_visit
        num_rows, elapsed_s = num_users * command.rows_per_user, 0.0
        if command.rows_per_user % at_once:
            raise ValueError(f"expected whole visits, got {command.rows_per_user} / {at_once}")
        for start in range(0, num_rows, command.rows_per_save):
            position = np.arange(start, min(start + command.rows_per_save, num_rows))
            visit, place = np.divmod(position, num_users * at_once)
            users = self.users[place // at_once]
            rows = self._maker.rows(users, visit * at_once + place % at_once)
            started = time.perf_counter()
            self.store.save(users, rows)
            elapsed_s += time.perf_counter() - started
        self.shard.flush()
        self.counts[:] = command.rows_per_user
        return num_rows / elapsed_s

    def append(self, chosen: np.ndarray) -> float:
        """One row for each of the distinct users ``chosen``; seconds that the save took."""
        rows = self._maker.rows(self.users[chosen], self.counts[chosen])
        self.counts[chosen] += 1
        started = time.perf_counter()
        self.store.save(self.users[chosen], rows)
        return time.perf_counter() - started


def _serve(connection: Connection) -> None:
    stores: dict[Path, _OpenStore] = {}
    try:
        while True:
            command = connection.recv()
            try:
                connection.send(_answer(stores, command, connection))
            except EOFError:
                raise
            except Exception as error:  # the caller raises it
                connection.send(error)
    except EOFError:  # nobody needs the stores any more
        for opened in stores.values():
            opened.shard.close()


def _answer(stores: dict[Path, _OpenStore], command: object, connection: Connection) -> object:
    match command:
        case FillStore():
            stores[command.directory] = opened = _OpenStore(command)
            return opened.fill(command)
        case Append():
            connection.send(None)  # answered when it begins; `StopAppending` gets what it did
            return _append(stores[command.directory], command, connection)
    raise ValueError(f"expected a command of {__name__}, got {command!r}")


def _append(opened: _OpenStore, command: Append, connection: Connection) -> Appended:
    rng = np.random.default_rng(command.seed)
    num_chosen = min(command.rows_per_save, len(opened.users))
    save_s: list[float] = []
    began = due = time.monotonic()
    while not connection.poll(max(0.0, due - time.monotonic())):
        save_s.append(opened.append(rng.choice(len(opened.users), num_chosen, replace=False)))
        due = max(due + 1 / command.saves_per_s, time.monotonic())
    connection.recv()
    rows = num_chosen * len(save_s)
    return Appended(
        rows, rows / (time.monotonic() - began), 1_000 * float(np.median(save_s or [0.0]))
    )
