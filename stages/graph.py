"""The walk of a request through the stages; whatever fails lowers the answer, never refuses it.

Without Ray: a stage is an awaitable call, so that the same walk runs over Serve handles and in a
test over plain objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from marm.items import ItemFeatures
from stages.breaker import BreakerPolicy
from stages.fallback import FallbackRetrieval
from stages.request import STAGES, StageName, StageRequest, StageResult
from stages.stage_arms import StageArms, StageLimits
from stages.variant import CallObserver, NobodyCounts, StageCall

Arms = Mapping[StageName, str]
"""The variant that serves a user, per stage."""


@dataclass(frozen=True)
class GraphResult:
    """The answer to a request: items best first, each stage that took part, what was lost.

    ``asked`` has what each stage was asked, so that another variant can be asked the same.
    """

    final: StageResult
    stages: dict[StageName, StageResult] = field(default_factory=dict)
    degraded: tuple[str, ...] = ()
    asked: dict[StageName, StageRequest] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Layers of memory behind the order of the answer."""
        return self.final.rows.depth


class StageGraph:
    """Retrieval, then cascading, then ranking."""

    def __init__(
        self,
        calls: Mapping[StageName, Mapping[str, StageCall]],
        limits: Mapping[StageName, StageLimits],
        fallback: FallbackRetrieval,
        control: Arms | None = None,
        breaker: BreakerPolicy | None = None,
        observer: CallObserver | None = None,
    ) -> None:
        """Wire the stages up.

        Args:
            calls: every variant of every stage.
            limits: how many candidates leave a stage, and how long it may take.
            fallback: where candidates come from when retrieval does not answer.
            control: the arm of each stage that stands in for a lost one; a stage's first variant
                when not given.
            breaker: when a variant is left alone.
            observer: counts the calls.

        Raises:
            ValueError: a control arm is not among the variants.
        """
        named = control or {}
        self._fallback = fallback
        self._stages = {
            stage: StageArms(
                stage,
                calls[stage],
                named.get(stage, next(iter(calls[stage]))),
                limits[stage],
                breaker or BreakerPolicy(),
                observer or NobodyCounts(),
            )
            for stage in STAGES
        }

    def arms_of(self, stage: StageName) -> StageArms:
        """One stage's arms."""
        return self._stages[stage]

    async def recommend(self, request: StageRequest, arms: Arms) -> GraphResult:
        """The ``request.limit`` best items for a user."""
        stages: dict[StageName, StageResult] = {}
        asked: dict[StageName, StageRequest] = {}
        degraded: list[str] = []

        async def ask(stage: StageName, question: StageRequest) -> StageResult | None:
            asked[stage] = question
            answer = await self._stages[stage].ask(question, arms[stage], degraded)
            if answer is not None:
                stages[stage] = answer
            return answer

        wanted = self._leaving("retrieval", request)
        result = await ask("retrieval", replace(request, limit=wanted))
        if result is None:
            result = await self._fallback.find(request, arms["retrieval"], wanted)
            stages["retrieval"] = result
        if len(result):
            wanted = self._leaving("cascading", request)
            answer = await ask("cascading", request.with_candidates(result.candidates, wanted))
            # Without cascading, ranking is given no more than cascading would have let through.
            result = truncated(result, wanted) if answer is None else answer
        if len(result):
            answer = await ask("ranking", request.with_candidates(result.candidates, request.limit))
            result = result if answer is None else answer
        return GraphResult(truncated(result, request.limit), stages, tuple(degraded), asked)

    def popular(self, request: StageRequest, arms: Arms) -> GraphResult:
        """The ``request.limit`` most popular items, without asking any stage."""
        found = self._fallback.popular(request, arms["retrieval"], request.limit)
        return GraphResult(found, {"retrieval": found})

    def _leaving(self, stage: StageName, request: StageRequest) -> int:
        """How many candidates leave a stage: never fewer than the request wants."""
        return max(self._stages[stage].limits.candidates, request.limit)


def truncated(result: StageResult, limit: int) -> StageResult:
    """The first ``limit`` candidates of a result."""
    if len(result) <= limit:
        return result
    head = slice(0, limit)
    candidates: ItemFeatures = result.candidates.take(head)
    task_scores: NDArray[np.float32] = result.task_scores[head]
    return replace(
        result, candidates=candidates, scores=result.scores[head], task_scores=task_scores
    )
