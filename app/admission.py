"""Who is let in: requests that cannot be answered in time are refused at once.

Whatever takes a share of the machine makes the others wait, so the time that a request will take
is estimated as the number of requests in work times the share that each cost the requests before
it. A request that would need more than its share of the deadline is refused with the time after
which another try makes sense; a refusal costs microseconds, where waiting would cost the deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from app.errors import OverloadedError

LEARNING_RATE = 0.1
"""Weight of the newest request in the estimate."""

CUT_SHORT_RATE = 0.01
"""The same for a request that was answered without some stage, and so looks cheap."""

MIN_RETRY_MS = 100.0


@dataclass(frozen=True)
class AdmissionPolicy:
    """Bounds of an `Admission`.

    Attributes:
        max_concurrent: requests in work, at most.
        min_concurrent: requests that are always taken, so that the estimate can be wrong and heal.
        target_share: of the time that a request has: it is refused when it would need more.
    """

    max_concurrent: int
    min_concurrent: int = 1
    target_share: float = 1.0


class Admission:
    """Counts the requests in work and estimates how long one more would take.

    Belongs to one event loop; not safe to share between threads.
    """

    def __init__(
        self, policy: AdmissionPolicy, clock_s: Callable[[], float] = time.perf_counter
    ) -> None:
        self._policy = policy
        self._clock_s = clock_s
        self._in_work = 0
        self._unit_ms = 0.0

    @property
    def in_work(self) -> int:
        """Requests that were let in and have not left."""
        return self._in_work

    def estimate_ms(self, in_work: int) -> float:
        """How long a request takes while ``in_work`` of them are in work; 0 before the first."""
        return self._unit_ms * in_work

    @contextmanager
    def admitted(self, available_ms: float) -> Iterator[Ticket]:
        """Let a request in that has ``available_ms``.

        Raises:
            OverloadedError: there are too many, or it would not be answered in time.
        """
        refusal = self.refusal(available_ms)
        if refusal is not None:
            raise refusal
        self._in_work += 1
        ticket = Ticket(self._clock_s(), self._in_work)
        try:
            yield ticket
        finally:
            self._learn(ticket)
            self._in_work -= 1

    def refusal(self, available_ms: float) -> OverloadedError | None:
        """Why a request that has ``available_ms`` would not be let in now; None when it would."""
        if self._in_work < self._policy.min_concurrent:
            return None
        allowed_ms = available_ms * self._policy.target_share
        estimate_ms = self.estimate_ms(self._in_work + 1)
        if self._in_work >= self._policy.max_concurrent:
            reason = f"{self._in_work} requests are in work already"
        elif estimate_ms > allowed_ms:
            reason = f"an answer would take about {estimate_ms:.0f} ms, {allowed_ms:.0f} is allowed"
        else:
            return None
        retry_ms = max(MIN_RETRY_MS, estimate_ms - allowed_ms)
        return OverloadedError(f"overloaded: {reason}; try again later", retry_ms)

    def _learn(self, ticket: Ticket) -> None:
        if not ticket.is_lesson:
            return
        took_ms = (self._clock_s() - ticket.started_s) * 1000
        # Stages compute in turn, so it waited for those that were there before it, also where they
        # left and nobody came; of what the number grew by meanwhile it met about half.
        grown_by = max(0, self._in_work - ticket.in_work_at_start)
        beside = ticket.in_work_at_start + grown_by / 2
        unit_ms = took_ms / beside
        rate = LEARNING_RATE if self._unit_ms else 1.0
        if ticket.was_cut_short and unit_ms < self._unit_ms:
            # It would have taken longer, had it been done in full; but a stage may stay away.
            rate = CUT_SHORT_RATE
        self._unit_ms += rate * (unit_ms - self._unit_ms)


@dataclass
class Ticket:
    """One request that was let in.

    Attributes:
        started_s: when it was.
        in_work_at_start: requests in work then, this one with them.
        is_lesson: set when it was answered, so that the time it took says something.
        was_cut_short: set when the answer lacks a stage, so that it was cheaper than others.
    """

    started_s: float
    in_work_at_start: int
    is_lesson: bool = False
    was_cut_short: bool = False
