"""The arms of one stage: the one that serves the request, and the control arm when it is lost."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from stages.breaker import BreakerPolicy
from stages.request import StageName, StageRequest, StageResult
from stages.variant import CallObserver, Lost, StageCall, Variant

FAIR_SHARE = 0.25
"""Of a stage's timeout: a variant that was given less is not blamed for being late."""


@dataclass(frozen=True)
class StageLimits:
    """How many candidates leave a stage, and how long it may take.

    Attributes:
        candidates: at most this many leave the stage.
        timeout_ms: the longest that the stage may take, however much time is left.
        budget_share: of the time left before the deadline, what the stage may take.
        control_share: of the stage's budget, what is kept for the control arm.
    """

    candidates: int
    timeout_ms: int
    budget_share: float = 1.0
    control_share: float = 0.4

    def budget_ms(self, remaining_ms: float) -> float:
        """Milliseconds that the stage may take."""
        return min(self.timeout_ms, remaining_ms * self.budget_share)


class StageArms:
    """Asks an arm, then the control arm, all within the stage's budget."""

    def __init__(
        self,
        stage: StageName,
        calls: Mapping[str, StageCall],
        control: str,
        limits: StageLimits,
        breaker: BreakerPolicy,
        observer: CallObserver,
    ) -> None:
        if control not in calls:
            raise ValueError(
                f"the control arm of {stage} must be one of {sorted(calls)}, got {control!r}"
            )
        self.limits = limits
        self._stage = stage
        self._control = control
        self._variants = {
            name: Variant(stage, name, call, breaker, observer, limits.timeout_ms * FAIR_SHARE)
            for name, call in calls.items()
        }

    def variant(self, name: str) -> Variant:
        """One arm; raises KeyError when the stage has none of that name."""
        return self._variants[name]

    async def ask(self, request: StageRequest, arm: str, degraded: list[str]) -> StageResult | None:
        """The stage's answer; None, with the reason in ``degraded``, when no arm gave one."""
        budget_ms = self.limits.budget_ms(request.deadline_ms - time.time() * 1000)
        if budget_ms <= 0:
            degraded.append(f"{self._stage}: skipped, no time was left before the deadline")
            return None
        if arm == self._control:
            answer = await self._variants[arm].ask(request, budget_ms)
            return self._taken(answer, degraded)
        return await self._ask_in_turn(request, arm, budget_ms, degraded)

    async def _ask_in_turn(
        self, request: StageRequest, arm: str, budget_ms: float, degraded: list[str]
    ) -> StageResult | None:
        started_s = time.perf_counter()
        arm_ms = budget_ms * (1 - self.limits.control_share)
        answer = await self._variants[arm].ask(request, arm_ms)
        if not isinstance(answer, Lost):
            return self._taken(answer, degraded)
        left_ms = budget_ms - (time.perf_counter() - started_s) * 1000
        degraded.append(f"{self._stage}: {arm} gave way to the control arm, {answer.reason}")
        if left_ms <= 0:
            degraded.append(f"{self._stage}: no time was left for the control arm")
            return None
        taken = self._taken(await self._variants[self._control].ask(request, left_ms), degraded)
        return None if taken is None else replace(taken, fallback_of=arm)

    def _taken(self, answer: StageResult | Lost, degraded: list[str]) -> StageResult | None:
        if isinstance(answer, Lost):
            degraded.append(f"{self._stage}: {answer.reason}")
            return None
        degraded.extend(shortfalls(answer))
        return answer


def shortfalls(result: StageResult) -> list[str]:
    """What a stage that answered had to do without."""
    found = []
    if result.rows.missing:
        found.append(f"{result.stage}: the user's memory shard did not answer")
    if result.reason:
        found.append(f"{result.stage}: {result.reason}")
    return found
