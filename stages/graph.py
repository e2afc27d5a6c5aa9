"""The walk of a request through the stages; whatever fails lowers the answer, never refuses it.

Without Ray: a stage is an awaitable call, so that the same walk runs over Serve handles and in a
test over plain objects.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from marm.items import ItemFeatures
from stages.popular import PopularItems
from stages.request import StageName, StageRequest, StageResult

logger = logging.getLogger("ray.serve")

StageCall = Callable[[StageRequest], Awaitable[StageResult]]
"""One stage variant, wherever it runs."""

Arms = Mapping[StageName, str]
"""The variant that serves a user, per stage."""


@dataclass(frozen=True)
class StageLimits:
    """How many candidates leave a stage, and how long it may take."""

    candidates: int
    timeout_ms: int


@dataclass(frozen=True)
class GraphResult:
    """The answer to a request: items best first, each stage that took part, what was lost."""

    final: StageResult
    stages: dict[StageName, StageResult] = field(default_factory=dict)
    degraded: tuple[str, ...] = ()


class StageGraph:
    """Retrieval, then cascading, then ranking."""

    def __init__(
        self,
        calls: Mapping[StageName, Mapping[str, StageCall]],
        limits: Mapping[StageName, StageLimits],
        popular: Callable[[], PopularItems],
    ) -> None:
        """``popular`` gives the items to start from when retrieval does not answer."""
        self._calls = calls
        self._limits = limits
        self._popular = popular

    async def recommend(self, request: StageRequest, arms: Arms) -> GraphResult:
        """The ``request.limit`` best items for a user."""
        stages: dict[StageName, StageResult] = {}
        degraded: list[str] = []
        limit = max(self._limits["retrieval"].candidates, request.limit)
        result = await self._call("retrieval", arms, replace(request, limit=limit), degraded)
        if result is None:
            result = self._popular_result(request, arms["retrieval"], limit)
        stages["retrieval"] = result
        for stage in ("cascading", "ranking"):
            if not len(result):
                break
            limit = self._limits[stage].candidates if stage == "cascading" else request.limit
            narrowed = request.with_candidates(result.candidates, max(limit, request.limit))
            answer = await self._call(stage, arms, narrowed, degraded)
            if answer is not None:
                result = stages[stage] = answer
        return GraphResult(
            final=truncated(result, request.limit), stages=stages, degraded=tuple(degraded)
        )

    async def _call(
        self, stage: StageName, arms: Arms, request: StageRequest, degraded: list[str]
    ) -> StageResult | None:
        """One stage's answer; None, with the reason in ``degraded``, when there is none."""
        remaining_ms = request.deadline_ms - time.time() * 1000
        budget_ms = min(self._limits[stage].timeout_ms, remaining_ms)
        if budget_ms <= 0:
            degraded.append(f"{stage}: skipped, no time was left before the deadline")
            return None
        deadline_ms = int(time.time() * 1000 + budget_ms)
        call = self._calls[stage][arms[stage]](replace(request, deadline_ms=deadline_ms))
        try:
            result = await asyncio.wait_for(call, budget_ms / 1000)
        except TimeoutError:
            degraded.append(f"{stage}: no answer within {budget_ms:.0f} ms")
            return None
        except Exception as error:
            # A stage may fail in any way; the request goes on without it.
            logger.warning("%s/%s failed: %s", stage, arms[stage], error)
            degraded.append(f"{stage}: failed ({type(error).__name__})")
            return None
        if result.outcome != "ok":
            degraded.append(f"{stage}: {result.reason}")
            return None
        degraded.extend(shortfalls(result))
        return result

    def _popular_result(self, request: StageRequest, variant: str, limit: int) -> StageResult:
        popular = self._popular()
        found = popular.top(limit, np.unique(request.exclude_item_ids))
        return StageResult(
            stage="retrieval",
            variant=variant,
            candidates=found.items,
            scores=found.scores,
            source="popular",
            num_in=len(popular),
        )


def shortfalls(result: StageResult) -> list[str]:
    """What a stage that answered had to do without."""
    found = []
    if result.rows.missing:
        found.append(f"{result.stage}: the user's memory shard did not answer")
    if result.reason:
        found.append(f"{result.stage}: {result.reason}")
    return found


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
