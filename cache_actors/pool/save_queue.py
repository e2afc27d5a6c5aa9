"""Saves on their way to one shard: in order, at most so many at once, gathered while they wait."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from queue import Queue

import numpy as np
from numpy.typing import NDArray

Send = Callable[[], None]
"""Store rows that were made ready and return when they are stored; raise if they are not."""


@dataclass(frozen=True)
class _Pending:
    user_ids: NDArray[np.int64]
    rows: NDArray[np.void]
    stored: Future[None]


class SaveAck:
    """`marm.memory.Ack` of a save that went to several shards."""

    def __init__(self, stored: list[Future[None]]) -> None:
        self._stored = stored

    def done(self) -> bool:
        """Whether every row is stored; false for a save that failed, which `wait` reports."""
        return all(future.done() and future.exception() is None for future in self._stored)

    def wait(self, timeout_s: float | None = None) -> None:
        """Return once every row is stored; raise what went wrong if any was not."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for future in self._stored:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                future.result(left_s)
            except FutureTimeoutError:
                if future.done():  # the save itself failed with a timeout
                    raise
                raise TimeoutError(
                    f"rows were not acknowledged within {timeout_s} s; they are still being sent"
                ) from None


class SaveQueue:
    """Sends saves one after the other from threads of its own.

    One send at a time keeps the order of a user's saves through every retry. Saves that wait are
    joined into one send, which changes nothing, since upserts apply in order. While one send is
    under way, the next is made ready.
    """

    def __init__(
        self,
        prepare: Callable[[NDArray[np.int64], NDArray[np.void]], Send],
        max_pending: int,
        max_rows_per_send: int,
        name: str,
    ) -> None:
        self._prepare = prepare
        self._max_pending = max_pending
        self._max_rows = max_rows_per_send
        self._waiting: deque[_Pending] = deque()
        self._ready: Queue[tuple[list[_Pending], list[Send]] | None] = Queue(maxsize=1)
        self._num_pending = 0
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=run, name=f"{name}-{part}", daemon=True)
            for part, run in (("prepare", self._run_prepare), ("send", self._run_send))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_pending(self) -> int:
        """Saves that are not acknowledged yet."""
        return self._num_pending

    def put(self, user_ids: NDArray[np.int64], rows: NDArray[np.void]) -> Future[None]:
        """Queue a save; blocks while ``max_pending`` are unacknowledged. The arrays are kept, so
        they must not be changed afterwards."""
        stored: Future[None] = Future()
        with self._changed:
            while self._num_pending >= self._max_pending and not self._closed:
                self._changed.wait()
            if self._closed:
                raise RuntimeError("this memory client is closed; make a new one to save rows")
            self._waiting.append(_Pending(user_ids, rows, stored))
            self._num_pending += 1
            self._changed.notify_all()
        return stored

    def close(self) -> None:
        """Refuse new saves and return when the queued ones were sent or failed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run_prepare(self) -> None:
        while batch := self._next_batch():
            try:
                self._ready.put((batch, self._prepare_all(batch)))
            except BaseException as raised:  # handed to whoever waits for the acknowledgement
                self._finish(batch, raised)
        self._ready.put(None)

    def _run_send(self) -> None:
        while ready := self._ready.get():
            with self._changed:
                self._changed.notify_all()  # the next batch may be made ready
            batch, sends = ready
            error: BaseException | None = None
            try:
                for send in sends:
                    send()
            except BaseException as raised:  # handed to whoever waits for the acknowledgement
                error = raised
            self._finish(batch, error)

    def _finish(self, batch: list[_Pending], error: BaseException | None) -> None:
        with self._changed:
            self._num_pending -= len(batch)
            self._changed.notify_all()
        for pending in batch:
            if error is None:
                pending.stored.set_result(None)
            else:
                pending.stored.set_exception(error)

    def _next_batch(self) -> list[_Pending]:
        """What waits, as far as one send takes it; empty once closed and drained."""
        with self._changed:
            # A batch that would only wait for its turn is better joined with what comes meanwhile.
            while not self._closed and (not self._waiting or self._ready.full()):
                self._changed.wait()
            batch: list[_Pending] = []
            num_rows = 0
            while self._waiting:
                num_rows += len(self._waiting[0].rows)
                if batch and num_rows > self._max_rows:
                    break
                batch.append(self._waiting.popleft())
            return batch

    def _prepare_all(self, batch: list[_Pending]) -> list[Send]:
        user_ids, rows = batch[0].user_ids, batch[0].rows
        if len(batch) > 1:
            user_ids = np.concatenate([pending.user_ids for pending in batch])
            opaque = np.dtype((np.void, rows.dtype.itemsize))  # else it copies field by field
            joined = np.concatenate([pending.rows.view(opaque) for pending in batch])
            rows = joined.view(rows.dtype)
        parts = [slice(s, s + self._max_rows) for s in range(0, len(rows), self._max_rows)]
        return [self._prepare(user_ids[part], rows[part]) for part in parts]
