"""What the endpoints do, without HTTP and without Ray."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from app.admission import Admission, AdmissionPolicy
from app.admission_gate import Refusal
from app.answer import to_response
from app.args import LimitArgs
from app.errors import OverloadedError, RefusedError, UnavailableError
from app.experiments.assignment import Assignment
from app.feedback import FeedbackService
from app.outcomes import OnOutcome, Route, counted, nobody_counts
from app.schemas import (
    FeedbackEvent,
    FeedbackResponse,
    HealthResponse,
    MemoryHealth,
    RecommendRequest,
    RecommendResponse,
    StageHealth,
)
from stages.graph import GraphResult, StageGraph
from stages.request import STAGES, StageName, StageRequest, StageStatus

logger = logging.getLogger("ray.serve")

NO_MODEL = "no retrieval model is published yet; run `marm train` (or `marm demo`), then try again"


AfterAnswer = Callable[[StageRequest, Assignment, GraphResult, float], None]
"""Told of an answered request, how it was answered and how many ms it took. It must not block."""


class Assigns(Protocol):
    """Who decides which variants serve a user."""

    def assign(
        self, user_id: int, overrides: Mapping[StageName, str], role: str | None = None
    ) -> Assignment:
        """The arms of one request."""
        ...


def let_all_in() -> Admission:
    """An admission that refuses nobody."""
    return Admission(AdmissionPolicy(max_concurrent=2**31, min_concurrent=2**31))


def now_ms() -> int:
    """The server's time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def age_s(then_ms: int | None, asked_ms: int) -> float | None:
    """Seconds from a moment to ``asked_ms``; None of an unknown one."""
    return None if then_ms is None else round((asked_ms - then_ms) / 1000, 3)


class Service:
    """Recommendations, feedback and health for the edge."""

    def __init__(
        self,
        graph: StageGraph,
        experiments: Assigns,
        feedback: FeedbackService,
        statuses: Callable[[], Awaitable[list[StageStatus]]],
        limits: LimitArgs,
        restore_awaited: Callable[[], str | None] = lambda: None,
        memory_health: Callable[[], MemoryHealth | None] = lambda: None,
        settings_problem: Callable[[], str] = lambda: "",
        admission: Admission | None = None,
        feedback_admission: Admission | None = None,
        after_answer: Sequence[AfterAnswer] = (),
        on_outcome: OnOutcome = nobody_counts,
    ) -> None:
        self.experiments = experiments
        self._admission = admission or let_all_in()
        self._feedback_admission = feedback_admission or let_all_in()
        self._after_answer = after_answer
        self._on_outcome = on_outcome
        self._graph = graph
        self._feedback = feedback
        self._statuses = statuses
        self._limits = limits
        self._restore_awaited = restore_awaited
        self._memory_health = memory_health
        self._settings_problem = settings_problem

    async def recommend(
        self,
        body: RecommendRequest,
        request_id: str,
        overrides: Mapping[StageName, str] | None = None,
        role: str | None = None,
    ) -> RecommendResponse:
        """The best items for a user, and how each stage came to them.

        Raises:
            RefusedError: the body asks for what this deployment does not do.
            OverloadedError: the answer would not come in time.
            UnavailableError: there is nothing to recommend from.
        """
        with counted("recommend", self._on_outcome) as counts:
            response = await self._recommend(body, request_id, overrides or {}, role)
            counts.outcome = "degraded" if response.degraded else "ok"
            return response

    async def _recommend(
        self,
        body: RecommendRequest,
        request_id: str,
        overrides: Mapping[StageName, str],
        role: str | None,
    ) -> RecommendResponse:
        started_s = time.perf_counter()
        request = self._stage_request(body, request_id)
        assignment = self.experiments.assign(body.user_id, overrides, role)
        with self._admission.admitted(self._limits.deadline_ms) as ticket:
            result = await self._answer(request, assignment)
            ticket.is_lesson = not assignment.popular
            ticket.was_cut_short = set(result.stages) != set(STAGES)
        retrieval = result.stages["retrieval"]
        if retrieval.model_version is None and not retrieval.num_in:
            reasons = "; ".join(result.degraded)
            raise UnavailableError(f"there is nothing to recommend from yet ({reasons})")
        response = to_response(body.user_id, request_id, result, assignment)
        self._tell(request, assignment, result, (time.perf_counter() - started_s) * 1000)
        return response

    def refusals(self) -> dict[str, Refusal]:
        """By route, whether a request that comes now is refused unseen; it is counted then."""

        def refusal(route: Route, admission: Admission, available_ms: float) -> Refusal:
            def look() -> OverloadedError | None:
                error = admission.refusal(available_ms)
                if error is not None:
                    self._on_outcome(route, "overloaded", 0.0)
                return error

            return look

        limits = self._limits
        return {
            "/recommend": refusal("recommend", self._admission, limits.deadline_ms),
            "/feedback": refusal(
                "feedback", self._feedback_admission, limits.feedback_timeout_s * 1000
            ),
        }

    async def _answer(self, request: StageRequest, assignment: Assignment) -> GraphResult:
        if assignment.popular:
            return self._graph.popular(request, assignment.arms)
        return await self._graph.recommend(request, assignment.arms)

    def _stage_request(self, body: RecommendRequest, request_id: str) -> StageRequest:
        k = self._limits.default_k if body.k is None else body.k
        if k > self._limits.max_k:
            raise RefusedError(f"k must be at most {self._limits.max_k}, got {k}")
        arrived_ms = now_ms()
        at_ms = body.context.timestamp_ms
        allowed = body.context.allow_item_ids
        self._check_times([at_ms], arrived_ms)
        return StageRequest(
            request_id=request_id,
            user_id=body.user_id,
            now_ms=arrived_ms if at_ms is None else at_ms,
            before_ms=at_ms,
            context_id=body.context.context_id,
            limit=k,
            deadline_ms=arrived_ms + self._limits.deadline_ms,
            exclude_item_ids=np.array(body.context.exclude_item_ids, np.int64),
            allow_item_ids=None if allowed is None else np.array(allowed, np.int64),
        )

    def _tell(
        self, request: StageRequest, assignment: Assignment, result: GraphResult, ms: float
    ) -> None:
        for told in self._after_answer:
            try:
                told(request, assignment, result, ms)
            except Exception:
                # The answer is made; who listens to answers can't take it back.
                logger.exception("request %s: what follows an answer failed", request.request_id)

    async def feedback(self, events: list[FeedbackEvent]) -> FeedbackResponse:
        """Store what users did.

        Raises:
            RefusedError: an event lies in the future.
            OverloadedError: too many wait to be stored.
            UnavailableError: they were not confirmed to be stored.
        """
        with counted("feedback", self._on_outcome):
            return await self._store(events)

    async def _store(self, events: list[FeedbackEvent]) -> FeedbackResponse:
        arrived_ms = now_ms()
        self._check_times([event.timestamp_ms for event in events], arrived_ms)
        with self._feedback_admission.admitted(self._limits.feedback_timeout_s * 1000) as ticket:
            try:
                response = await self._feedback.accept(events, arrived_ms)
            except Exception as error:
                raise UnavailableError(
                    f"the feedback was not confirmed ({type(error).__name__}: {error}); send the "
                    "same events again, with event ids nothing is counted twice"
                ) from error
            ticket.is_lesson = True
            return response

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
        asked_ms = now_ms()
        stages = {
            f"{status.stage}/{status.variant}": StageHealth(
                ready=status.ready,
                model_version=status.model_version,
                namespace=None if status.namespace is None else status.namespace.name,
                problem=status.problem,
                newest_event_ms=status.newest_event_ms,
                newest_event_age_s=age_s(status.newest_event_ms, asked_ms),
            )
            for status in statuses
        }
        waiting = [status.problem for status in statuses if status.problem]
        waiting += filter(None, [self._settings_problem()])
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
