"""One stage variant as the walk of a request sees it: asked within a time, left out when dead."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from stages.breaker import BreakerPolicy, BreakerState, CircuitBreaker
from stages.request import StageName, StageRequest, StageResult

logger = logging.getLogger("ray.serve")

StageCall = Callable[[StageRequest], Awaitable[StageResult]]
"""One stage variant, wherever it runs. Cancelling the call has to cancel what it started."""

LossKind = Literal["late", "failed", "no_model", "full", "left_out"]
CallOutcome = Literal["ok", "late", "failed", "no_model", "full", "left_out"]


class QueueFullError(RuntimeError):
    """A variant takes no more requests now; raised by a `StageCall`."""


@dataclass(frozen=True)
class Lost:
    """Why a variant gave no answer. ``error`` is what its call raised, where it did."""

    variant: str
    kind: LossKind
    reason: str
    error: BaseException | None = field(default=None, compare=False)


class CallObserver(Protocol):
    """Who counts the calls of variants."""

    def called(self, stage: StageName, variant: str, outcome: CallOutcome, ms: float) -> None:
        """A variant was asked, or left out; ``ms`` is how long the request waited."""
        ...

    def breaker_is(self, stage: StageName, variant: str, state: BreakerState) -> None:
        """The breaker of a variant after a call."""
        ...


class NobodyCounts:
    """A `CallObserver` that does nothing."""

    def called(self, stage: StageName, variant: str, outcome: CallOutcome, ms: float) -> None:
        """Do nothing."""

    def breaker_is(self, stage: StageName, variant: str, state: BreakerState) -> None:
        """Do nothing."""


class Variant:
    """A stage variant behind its circuit breaker.

    While the breaker is open a request is not held up at all: a probe is a copy of a request that
    is sent beside it, and whose answer is thrown away.
    """

    def __init__(
        self,
        stage: StageName,
        name: str,
        call: StageCall,
        policy: BreakerPolicy,
        observer: CallObserver,
        fair_ms: float = 0.0,
    ) -> None:
        """Being late counts against the variant only where it was given at least ``fair_ms``."""
        self.name = name
        self._fair_ms = fair_ms
        self._stage: StageName = stage
        self._call = call
        self._breaker = CircuitBreaker(policy)
        self._observer = observer
        self._last_reason = ""
        self._last_error: BaseException | None = None
        self._probe: asyncio.Task[StageResult | Lost] | None = None

    @property
    def breaker_state(self) -> BreakerState:
        """Whether requests reach the variant."""
        return self._breaker.state

    async def ask(self, request: StageRequest, budget_ms: float) -> StageResult | Lost:
        """The variant's answer, or why there is none within ``budget_ms``."""
        if self._breaker.state != "closed":
            if self._breaker.probe_is_due():
                self._probe = asyncio.create_task(self._attempt(request, budget_ms))
            self._observer.called(self._stage, self.name, "left_out", 0.0)
            return Lost(self.name, "left_out", self._last_reason)
        return await self._attempt(request, budget_ms)

    async def _attempt(self, request: StageRequest, budget_ms: float) -> StageResult | Lost:
        started_s = time.perf_counter()
        deadline_ms = int(time.time() * 1000 + budget_ms)
        try:
            answer = await self._answer(replace(request, deadline_ms=deadline_ms), budget_ms)
        except asyncio.CancelledError:
            self._breaker.gave_up()
            raise
        if isinstance(answer, Lost):
            self._last_reason = answer.reason
            # A full queue is a sign of life, and being late with too little time proves nothing.
            # What a lost call carried besides was lost with it, and counts once.
            is_same_call = answer.error is not None and answer.error is self._last_error
            is_unfair = answer.kind == "late" and budget_ms < self._fair_ms
            self._last_error = answer.error
            if answer.kind == "full" or is_unfair or is_same_call:
                self._breaker.gave_up()
            else:
                self._breaker.failed()
        else:
            self._last_error = None
            self._breaker.succeeded()
        outcome: CallOutcome = answer.kind if isinstance(answer, Lost) else "ok"
        elapsed_ms = (time.perf_counter() - started_s) * 1000
        self._observer.called(self._stage, self.name, outcome, elapsed_ms)
        self._observer.breaker_is(self._stage, self.name, self._breaker.state)
        return answer

    async def _answer(self, request: StageRequest, budget_ms: float) -> StageResult | Lost:
        try:
            async with asyncio.timeout(budget_ms / 1000):
                result = await self._call(request)
        except TimeoutError:
            return Lost(self.name, "late", f"no answer within {budget_ms:.0f} ms")
        except QueueFullError:
            return Lost(self.name, "full", "its queue is full")
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return self._failed("CancelledError", "the call was cancelled where it ran")
        except Exception as error:
            # A stage may fail in any way; the request goes on without it.
            return self._failed(type(error).__name__, str(error), error)
        if result.outcome != "ok":
            return Lost(self.name, result.outcome, result.reason)
        return result

    def _failed(self, kind: str, detail: str, error: BaseException | None = None) -> Lost:
        logger.warning("%s/%s failed: %s: %s", self._stage, self.name, kind, detail)
        return Lost(self.name, "failed", f"failed ({kind})", error)
