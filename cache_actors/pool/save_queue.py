"""Saves on their way to one shard: in order, at most so many at once, gathered while they wait."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Send = Callable[[NDArray[np.int64], NDArray[np.void]], None]
"""Store rows and return when they are stored; raise if they are not."""


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
    """Sends saves one after the other from a thread of its own.

    One send at a time keeps the order of a user's saves through every retry. Saves that wait are
    joined into one send, which changes nothing, since upserts apply in order.
    """

    def __init__(self, send: Send, max_pending: int, max_rows_per_send: int, name: str) -> None:
        self._send = send
        self._max_pending = max_pending
        self._max_rows = max_rows_per_send
        self._waiting: deque[_Pending] = deque()
        self._num_pending = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

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
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            error: BaseException | None = None
            try:
                self._send_all(batch)
            except BaseException as raised:  # handed to whoever waits for the acknowledgement
                error = raised
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
            while not self._waiting and not self._closed:
                self._changed.wait()
            batch: list[_Pending] = []
            num_rows = 0
            while self._waiting:
                num_rows += len(self._waiting[0].rows)
                if batch and num_rows > self._max_rows:
                    break
                batch.append(self._waiting.popleft())
            return batch

    def _send_all(self, batch: list[_Pending]) -> None:
        user_ids, rows = batch[0].user_ids, batch[0].rows
        if len(batch) > 1:
            user_ids = np.concatenate([pending.user_ids for pending in batch])
            rows = np.concatenate([pending.rows for pending in batch])
        for start in range(0, len(rows), self._max_rows):
            part = slice(start, start + self._max_rows)
            self._send(user_ids[part], rows[part])
