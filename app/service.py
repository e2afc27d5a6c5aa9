"""What the endpoints do, without HTTP and without Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import numpy as np

from app.ab import ArmTable
from app.args import LimitArgs
from app.feedback import FeedbackService
from app.schemas import (
    FeedbackEvent,
    FeedbackResponse,
    HealthResponse,
    MemoryHealth,
    RecommendedItem,
    RecommendRequest,
    RecommendResponse,
    RowCounts,
    StageHealth,
    StageReport,
)
from stages.graph import GraphResult, StageGraph
from stages.request import StageRequest, StageResult, StageStatus

NO_MODEL = "no retrieval model is published yet; run `marm train` (or `marm demo`), then try again"


class RefusedError(ValueError):
    """Well-formed input that this service does not accept; the message says why."""


class UnavailableError(RuntimeError):
    """The service cannot answer now; the message says what it waits for."""


def now_ms() -> int:
    """The server's time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class Service:
    """Recommendations, feedback and health for the edge."""

    def __init__(
        self,
        graph: StageGraph,
        arms: ArmTable,
        feedback: FeedbackService,
        statuses: Callable[[], Awaitable[list[StageStatus]]],
        limits: LimitArgs,
        restore_awaited: Callable[[], str | None] = lambda: None,
        memory_health: Callable[[], MemoryHealth | None] = lambda: None,
    ) -> None:
        self.arms = arms
        self._graph = graph
        self._feedback = feedback
        self._statuses = statuses
        self._limits = limits
        self._restore_awaited = restore_awaited
        self._memory_health = memory_health

    async def recommend(self, body: RecommendRequest, request_id: str) -> RecommendResponse:
        """The best items for a user, and how each stage came to them."""
        k = self._limits.default_k if body.k is None else body.k
        if k > self._limits.max_k:
            raise RefusedError(f"k must be at most {self._limits.max_k}, got {k}")
        arrived_ms = now_ms()
        at_ms = body.context.timestamp_ms
        self._check_times([at_ms], arrived_ms)
        request = StageRequest(
            request_id=request_id,
            user_id=body.user_id,
            now_ms=arrived_ms if at_ms is None else at_ms,
            before_ms=at_ms,
            context_id=body.context.context_id,
            limit=k,
            deadline_ms=arrived_ms + self._limits.deadline_ms,
            exclude_item_ids=np.array(body.context.exclude_item_ids, np.int64),
        )
        result = await self._graph.recommend(request, self.arms.assign(body.user_id))
        retrieval = result.stages["retrieval"]
        if retrieval.model_version is None and not retrieval.num_in:
            reasons = "; ".join(result.degraded)
            raise UnavailableError(f"there is nothing to recommend from yet ({reasons})")
        return to_response(body.user_id, request_id, result)

    async def feedback(self, events: list[FeedbackEvent]) -> FeedbackResponse:
        """Store what users did."""
        arrived_ms = now_ms()
        self._check_times([event.timestamp_ms for event in events], arrived_ms)
        try:
            return await self._feedback.accept(events, arrived_ms)
        except Exception as error:
            raise UnavailableError(
                f"the feedback was not confirmed ({type(error).__name__}: {error}); send the same "
                "events again, with event ids nothing is counted twice"
            ) from error

    async def health(self) -> HealthResponse:
        """Whether requests can be answered, by stage variant."""
        memory = await asyncio.to_thread(self._memory_health)
        health = await self._stage_health()
        if health.status == "ready" and memory is not None and memory.problem:
            return HealthResponse(
                status="degraded", reason=memory.problem, stages=health.stages, memory=memory
            )
        return health.model_copy(update={"memory": memory})

    async def _stage_health(self) -> HealthResponse:
        statuses = await self._statuses()
        stages = {
            f"{status.stage}/{status.variant}": StageHealth(
                ready=status.ready,
                model_version=status.model_version,
                namespace=None if status.namespace is None else status.namespace.name,
                problem=status.problem,
            )
            for status in statuses
        }
        waiting = [status.problem for status in statuses if status.problem]
        if not any(status.ready for status in statuses if status.stage == "retrieval"):
            return HealthResponse(status="no_model", reason=NO_MODEL, stages=stages)
        awaited = await asyncio.to_thread(self._restore_awaited)
        if awaited is not None:  # it answers already, but from a memory that is nearly empty
            return HealthResponse(status="restoring", reason=awaited, stages=stages)
        if waiting:
            return HealthResponse(status="degraded", reason="; ".join(waiting), stages=stages)
        return HealthResponse(status="ready", reason="", stages=stages)

    def _check_times(self, times_ms: list[int | None], arrived_ms: int) -> None:
        latest_ms = arrived_ms + self._limits.max_clock_skew_ms
        for index, time_ms in enumerate(times_ms):
            if time_ms is not None and time_ms > latest_ms:
                where = f" (entry {index})" if len(times_ms) > 1 else ""
                raise RefusedError(
                    f"timestamp_ms must be milliseconds since 1970 and not in the future, got "
                    f"{time_ms}{where} while the server's clock shows {arrived_ms}"
                )


def to_response(user_id: int, request_id: str, result: GraphResult) -> RecommendResponse:
    """The answer as it is sent."""
    final = result.final
    return RecommendResponse(
        user_id=user_id,
        items=[
            RecommendedItem(
                item_id=int(item_id),
                score=float(final.scores[index]),
                tasks={
                    task: float(final.task_scores[index, column])
                    for column, task in enumerate(final.tasks)
                },
            )
            for index, item_id in enumerate(final.candidates.item_id.tolist())
        ],
        stages={stage: to_report(answer) for stage, answer in result.stages.items()},
        degraded=list(result.degraded),
        request_id=request_id,
    )


def to_report(result: StageResult) -> StageReport:
    """One stage's part of the answer as it is sent."""
    return StageReport(
        variant=result.variant,
        model_version=result.model_version,
        source=result.source,
        candidates_in=result.num_in,
        candidates_out=len(result),
        ms=round(result.elapsed_ms, 3),
        memory_depth=result.rows.depth,
        rows=RowCounts(raw=result.rows.raw, memorised=result.rows.memorised),
    )
