"""Don't keep asking a server that does not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class CircuitBreaker:
    """Open after a failure for a pause that doubles with every further one, then let one try.

    While it is open nobody waits for the server: a dead one costs one timeout per pause, whatever
    the load. Safe for many threads.
    """

    def __init__(
        self,
        first_pause_s: float = 0.1,
        longest_pause_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._first_pause_s = first_pause_s
        self._longest_pause_s = longest_pause_s
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._next_try_s = 0.0

    @property
    def is_closed(self) -> bool:
        """Whether the last try succeeded."""
        return not self._failures

    def wait_s(self) -> float:
        """How long until the next try is let through; 0 if it would be now."""
        with self._lock:
            return max(0.0, self._next_try_s - self._clock()) if self._failures else 0.0

    def allow(self) -> bool:
        """Whether to try. After a pause, one caller is let through and the others wait for it."""
        with self._lock:
            if not self._failures:
                return True
            now = self._clock()
            if now < self._next_try_s:
                return False
            self._next_try_s = now + self._pause_s()
            return True

    def succeeded(self) -> None:
        """A try went well."""
        if self._failures:
            with self._lock:
                self._failures = 0

    def failed(self) -> None:
        """A try failed."""
        with self._lock:
            self._failures += 1
            self._next_try_s = self._clock() + self._pause_s()

    def _pause_s(self) -> float:
        doublings = min(self._failures - 1, 30)
        return min(self._longest_pause_s, self._first_pause_s * 2**doublings)
