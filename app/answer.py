"""The answer to a request as it is sent."""

from __future__ import annotations

from app.experiments.assignment import Assignment
from app.schemas import RecommendedItem, RecommendResponse, RowCounts, StageReport
from stages.graph import GraphResult
from stages.request import StageResult


def to_response(
    user_id: int, request_id: str, result: GraphResult, assignment: Assignment
) -> RecommendResponse:
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
        depth=result.depth,
        request_id=request_id,
        arms=dict(assignment.arms),
        experiments=dict(assignment.experiments),
        holdout=assignment.holdout,
        overridden=list(assignment.overridden),
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
        fallback_of=result.fallback_of,
        rows=RowCounts(raw=result.rows.raw, memorised=result.rows.memorised),
    )
