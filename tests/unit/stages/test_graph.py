from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
from serving_models import some_items

from marm.items import ItemFeatures
from stages.graph import StageGraph, StageLimits
from stages.popular import PopularItems
from stages.request import RowsRead, StageRequest, StageResult

ARMS = {"retrieval": "a", "cascading": "a", "ranking": "a"}
LIMITS = {
    "retrieval": StageLimits(40, 5000),
    "cascading": StageLimits(20, 5000),
    "ranking": StageLimits(20, 5000),
}
POPULAR = PopularItems.ranked(some_items(60), np.linspace(1, 0, 60).astype(np.float32))


def make_request(limit: int = 5, deadline_in_ms: int = 60_000) -> StageRequest:
    return StageRequest(
        request_id="r",
        user_id=1,
        now_ms=1,
        before_ms=None,
        context_id=0,
        limit=limit,
        deadline_ms=int(time.time() * 1000) + deadline_in_ms,
    )


def answer(stage: str, items: ItemFeatures, **changes) -> StageResult:
    scores = np.linspace(1, 0, len(items)).astype(np.float32)
    return StageResult(
        **{
            "stage": stage,
            "variant": "a",
            "model_version": 1,
            "candidates": items,
            "scores": scores,
            **changes,
        }
    )


async def retrieval(request: StageRequest) -> StageResult:
    return answer("retrieval", some_items(60).take(slice(0, request.limit)), source="retrieval")


def reversing(stage: str):
    async def call(request: StageRequest) -> StageResult:
        backwards = np.arange(len(request.candidates))[::-1][: request.limit]
        return answer(stage, request.candidates.take(backwards), num_in=len(request.candidates))

    return call


async def failing(request: StageRequest) -> StageResult:
    raise ConnectionError("replica died")


async def hanging(request: StageRequest) -> StageResult:
    await asyncio.Event().wait()
    raise AssertionError


async def unpublished(request: StageRequest) -> StageResult:
    return StageResult("ranking", "a", outcome="no_model", reason="no model is published")


def walk(request=None, limits=LIMITS, popular=POPULAR, **calls):
    chosen = {
        "retrieval": retrieval,
        "cascading": reversing("cascading"),
        "ranking": reversing("ranking"),
        **calls,
    }
    graph = StageGraph(
        {stage: {"a": call} for stage, call in chosen.items()}, limits, lambda: popular
    )
    return asyncio.run(graph.recommend(request or make_request(), ARMS))


def test_counts_shrink_from_stage_to_stage():
    result = walk()
    assert {stage: len(part) for stage, part in result.stages.items()} == {
        "retrieval": 40,
        "cascading": 20,
        "ranking": 5,
    }
    # 40 items, reversed and cut to 40..21, reversed again: 21..25.
    assert result.final.candidates.item_id.tolist() == [21, 22, 23, 24, 25]
    assert result.degraded == ()


def test_more_items_than_a_stage_keeps_can_be_asked_for():
    assert len(walk(make_request(limit=50)).final) == 50


@pytest.mark.parametrize(
    ("call", "reason"),
    [(failing, "failed (ConnectionError)"), (unpublished, "no model is published")],
)
@pytest.mark.parametrize("stage", ["cascading", "ranking"])
def test_a_lost_stage_is_skipped(stage, call, reason):
    result = walk(**{stage: call})
    assert result.degraded == (f"{stage}: {reason}",)
    assert stage not in result.stages
    assert len(result.final) == 5
    assert len(result.final.scores) == 5


@pytest.mark.parametrize("stage", ["retrieval", "cascading", "ranking"])
def test_a_stage_that_hangs_costs_its_timeout_only(stage):
    result = walk(limits={**LIMITS, stage: StageLimits(20, 20)}, **{stage: hanging})
    assert result.degraded == (f"{stage}: no answer within 20 ms",)
    assert len(result.final) == 5


def test_without_retrieval_popular_items_are_ranked():
    result = walk(retrieval=failing)
    assert result.stages["retrieval"].source == "popular"
    assert result.stages["retrieval"].num_in == 60
    assert result.stages["ranking"].candidates.item_id.tolist() == [21, 22, 23, 24, 25]


def test_without_anything_the_answer_is_empty_and_says_why():
    result = walk(retrieval=failing, popular=PopularItems.empty())
    assert len(result.final) == 0
    assert list(result.stages) == ["retrieval"]
    assert result.degraded == ("retrieval: failed (ConnectionError)",)


def test_after_the_deadline_no_stage_is_called():
    result = walk(make_request(deadline_in_ms=-1))
    assert len(result.degraded) == 3
    assert result.final.candidates.item_id.tolist() == [1, 2, 3, 4, 5]


def test_stages_are_told_when_nobody_waits_any_more():
    seen = []

    async def spying(request: StageRequest) -> StageResult:
        seen.append(request.deadline_ms - time.time() * 1000)
        return await reversing("ranking")(request)

    walk(limits={**LIMITS, "ranking": StageLimits(20, 700)}, ranking=spying)
    assert 0 < seen[0] <= 700


def test_a_missing_shard_is_told():
    async def blind(request: StageRequest) -> StageResult:
        return answer("ranking", request.candidates, rows=RowsRead(missing=True))

    assert walk(ranking=blind).degraded == ("ranking: the user's memory shard did not answer",)
