"""Requests of a replica compute one after the other, not beside each other.

A replica's torch threads all work on one request at a time. Beside each other, requests evict each
other's rows from the caches, wait for Python's lock, and all finish late; in turn, the first ones
finish early and each costs less. What only waits, such as a read of memory, needs no turn, and who
was cancelled while waiting takes none.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from stages.executor import nobody_waits


class TurnMissedError(RuntimeError):
    """A request's time was over before its turn came, so it was not computed."""


class Turns:
    """Gives turns in the order in which they were asked for. For the threads of one replica."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_taken = False
        self._waiting: deque[threading.Event] = deque()

    @property
    def num_waiting(self) -> int:
        """Threads that wait for their turn."""
        return len(self._waiting)

    @contextmanager
    def turn(self, deadline_ms: float) -> Iterator[None]:
        """Wait for a turn, until ``deadline_ms`` (wall clock), and keep it for the block.

        Raises:
            TurnMissedError: the deadline passed, or nobody waits for the result any more.
        """
        if not self._take(deadline_ms / 1000 - time.time()):
            raise TurnMissedError("its time was over before its turn to be computed came")
        try:
            if nobody_waits():
                raise TurnMissedError("it was cancelled before its turn to be computed came")
            yield
        finally:
            self._pass_on()

    def _take(self, left_s: float) -> bool:
        if left_s <= 0:
            return False
        with self._lock:
            if not self._is_taken:
                self._is_taken = True
                return True
            mine = threading.Event()
            self._waiting.append(mine)
        try:
            if mine.wait(min(left_s, threading.TIMEOUT_MAX)):
                return True
        except BaseException:
            if not self._leave(mine):
                self._pass_on()
            raise
        return not self._leave(mine)

    def _leave(self, mine: threading.Event) -> bool:
        """Stop waiting; false when the turn came in the last moment."""
        with self._lock:
            if mine.is_set():
                return False
            self._waiting.remove(mine)
            return True

    def _pass_on(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()  # it stays taken
            else:
                self._is_taken = False
