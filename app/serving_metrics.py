"""What an ingress replica counts, as metrics of Ray: requests, stages, depth, what was lost."""

from __future__ import annotations

from ray.serve.metrics import Counter, Gauge, Histogram

from app.experiments.assignment import Assignment
from app.outcomes import RequestOutcome, Route
from stages.breaker import BreakerState
from stages.graph import GraphResult
from stages.request import STAGES, StageName, StageRequest
from stages.variant import CallOutcome

BUCKETS_MS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
BREAKER_LEVELS: dict[BreakerState, int] = {"closed": 0, "half_open": 1, "open": 2}


class ServingMetrics:
    """Counts requests and calls of stages; make one per ingress replica, inside of it."""

    def __init__(self) -> None:
        self._requests = Counter(
            "marm_requests_total", "Requests by what became of them.", ("route", "outcome")
        )
        self._request_ms = Histogram(
            "marm_request_ms", "Time of a request at the edge.", BUCKETS_MS, ("route", "outcome")
        )
        stage_tags = ("stage", "variant")
        self._calls = Counter(
            "marm_stage_calls_total", "Calls of stage variants.", (*stage_tags, "outcome")
        )
        self._stage_ms = Histogram(
            "marm_stage_ms", "Time that a request waited for a variant.", BUCKETS_MS, stage_tags
        )
        self._breakers = Gauge(
            "marm_breaker_state", "0 asked, 1 probed, 2 left alone (a dead variant).", stage_tags
        )
        self._depth = Counter(
            "marm_answers_by_depth_total",
            "Answers by the layers of memory behind their order.",
            ("stage", "variant", "depth"),
        )
        self._fallbacks = Counter(
            "marm_fallbacks_total", "Stages that were lost, and what stood in.", ("stage", "by")
        )

    def outcome(self, route: Route, outcome: RequestOutcome, ms: float) -> None:
        """A request is over."""
        tags = {"route": route, "outcome": outcome}
        self._requests.inc(tags=tags)
        self._request_ms.observe(ms, tags=tags)

    def called(self, stage: StageName, variant: str, outcome: CallOutcome, ms: float) -> None:
        """A variant was asked, or left out."""
        tags = {"stage": stage, "variant": variant}
        self._calls.inc(tags={**tags, "outcome": outcome})
        if outcome != "left_out":
            self._stage_ms.observe(ms, tags=tags)

    def breaker_is(self, stage: StageName, variant: str, state: BreakerState) -> None:
        """A variant's breaker after a call."""
        self._breakers.set(BREAKER_LEVELS[state], tags={"stage": stage, "variant": variant})

    def answered(
        self, request: StageRequest, assignment: Assignment, result: GraphResult, ms: float
    ) -> None:
        """A request was answered."""
        final = result.final
        self._depth.inc(
            tags={"stage": final.stage, "variant": final.variant, "depth": str(result.depth)}
        )
        for stage, by in stand_ins(result).items():
            self._fallbacks.inc(tags={"stage": stage, "by": by})


def stand_ins(result: GraphResult) -> dict[StageName, str]:
    """The stages that were asked and lost, and what stood in: ``control``, ``popular``,
    ``similar``, or ``none`` where the stage was skipped."""
    found: dict[StageName, str] = {}
    for stage in STAGES:
        if stage not in result.asked:
            continue
        answer = result.stages.get(stage)
        if answer is None:
            found[stage] = "none"
        elif answer.fallback_of:
            found[stage] = "control"
        elif answer.model_version is None:
            found[stage] = str(answer.source)
    return found
