"""A circuit breaker: what failed several times in a row is left alone, and tried now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

BreakerState = Literal["closed", "open", "half_open"]


@dataclass(frozen=True)
class BreakerPolicy:
    """When to stop asking, and how often to try again.

    Attributes:
        failures: failures in a row after which nothing is asked any more.
        probe_every_s: seconds between the trials of what is left alone.
    """

    failures: int = 5
    probe_every_s: float = 1.0

    def __post_init__(self) -> None:
        if self.failures < 1 or not self.probe_every_s > 0:
            raise ValueError(
                "a breaker needs failures of at least 1 and probe_every_s above 0, got "
                f"{self.failures} and {self.probe_every_s}"
            )


class CircuitBreaker:
    """Closed: ask. Open: don't. Half open: one probe is under way, and decides.

    Not safe to share between threads; it belongs to one event loop.
    """

    def __init__(
        self, policy: BreakerPolicy, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._policy = policy
        self._clock_s = clock_s
        self._failures = 0
        self._probe_at_s = 0.0
        self._state: BreakerState = "closed"

    @property
    def state(self) -> BreakerState:
        """Whether requests pass."""
        return self._state

    def probe_is_due(self) -> bool:
        """Whether it is time for a probe; the caller that hears True has to make it."""
        if self._state != "open" or self._clock_s() < self._probe_at_s:
            return False
        self._state = "half_open"
        return True

    def succeeded(self) -> None:
        """An answer came: requests pass."""
        self._failures = 0
        self._state = "closed"

    def failed(self) -> None:
        """No answer came; after enough of them in a row, requests do not pass."""
        self._failures += 1
        if self._state == "half_open" or self._failures >= self._policy.failures:
            self._open()

    def gave_up(self) -> None:
        """The caller went away before an answer, which says nothing; a probe is due again."""
        if self._state == "half_open":
            self._open()

    def _open(self) -> None:
        self._state = "open"
        self._probe_at_s = self._clock_s() + self._policy.probe_every_s
