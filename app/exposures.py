"""Answers, and runs of shadow arms, as rows of the exposure log."""

from __future__ import annotations

from typing import Protocol

from app.experiments.args import ExposureArgs
from app.experiments.assignment import Assignment
from cache_actors.exposure_log.schema import Exposure, StageExposure
from cache_actors.exposure_log.writer import ExposureWriter
from cache_actors.home import Home
from stages.graph import GraphResult
from stages.request import StageName, StageRequest, StageResult


def answer_exposure(
    request: StageRequest, assignment: Assignment, result: GraphResult, latency_ms: float
) -> Exposure:
    """The row of an answer that was sent."""
    final = result.final
    return Exposure(
        request_id=request.request_id,
        # The moment that the answer is for, which feedback on it is reported after.
        time_ms=request.now_ms,
        user_id=request.user_id,
        item_ids=final.candidates.item_id,
        scores=final.scores,
        latency_ms=latency_ms,
        degraded=result.degraded,
        holdout=assignment.holdout,
        overridden=bool(assignment.overridden),
        stages={
            stage: stage_exposure(assignment, stage, result.stages.get(stage))
            for stage in assignment.arms
        },
    )


def stage_exposure(
    assignment: Assignment, stage: StageName, result: StageResult | None
) -> StageExposure:
    """One stage's part; ``result`` is None where the stage did not answer."""
    return StageExposure(
        experiment=assignment.experiments.get(stage, ""),
        arm=assignment.arms[stage],
        version=None if result is None else result.model_version,
        depth=0 if result is None else result.rows.depth,
    )


def shadow_exposure(
    request: StageRequest, assignment: Assignment, result: StageResult, latency_ms: float
) -> Exposure:
    """The row of a shadow run: what ``result.variant`` answered to what its stage was asked.

    The other stages are named by the arms whose candidates it was given. A result whose outcome is
    not ``"ok"`` gives a row without items that says why.
    """
    head = slice(0, request.limit)
    arms = {**assignment.arms, result.stage: result.variant}
    parts: dict[str, StageExposure] = {stage: StageExposure(arm=arm) for stage, arm in arms.items()}
    parts[result.stage] = StageExposure(
        arm=result.variant,
        version=result.model_version,
        depth=result.rows.depth,
        shadow=True,
    )
    return Exposure(
        request_id=request.request_id,
        time_ms=request.now_ms,
        user_id=request.user_id,
        item_ids=result.candidates.item_id[head],
        scores=result.scores[head],
        latency_ms=latency_ms,
        degraded=(f"{result.stage}: {result.reason}",) if result.reason else (),
        holdout=assignment.holdout,
        overridden=bool(assignment.overridden),
        stages=parts,
    )


class ExposureSink(Protocol):
    """Where rows are buffered, see `cache_actors.exposure_log.writer`."""

    def record(self, exposure: Exposure) -> bool:
        """Take a row without waiting; false when it was dropped."""
        ...


class RecordAnswers:
    """Gives a row to the log for every answer."""

    def __init__(self, sink: ExposureSink) -> None:
        self._sink = sink

    def __call__(
        self, request: StageRequest, assignment: Assignment, result: GraphResult, latency_ms: float
    ) -> None:
        """Record one answer."""
        self._sink.record(answer_exposure(request, assignment, result, latency_ms))


def exposure_writer(home: Home, settings: ExposureArgs) -> ExposureWriter:
    """A writer into the exposure log of a home; it runs until it is closed."""
    return ExposureWriter(
        home.exposures, settings.max_rows, settings.max_age_s, settings.max_buffered
    )
