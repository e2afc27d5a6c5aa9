from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest
from serving_models import some_items

from marm.items import ItemFeatures
from stages.breaker import BreakerPolicy
from stages.fallback import FallbackRetrieval
from stages.graph import StageGraph, StageLimits
from stages.popular import PopularItems
from stages.request import RowsRead, StageRequest, StageResult
from stages.similar_items import SimilarItems
from stages.variant import QueueFullError

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


async def full(request: StageRequest) -> StageResult:
    raise QueueFullError


async def cancelled_remotely(request: StageRequest) -> StageResult:
    raise asyncio.CancelledError


async def unpublished(request: StageRequest) -> StageResult:
    return StageResult("ranking", "a", outcome="no_model", reason="no model is published")


def make_graph(limits=LIMITS, popular=POPULAR, breaker=None, **calls) -> StageGraph:
    """A graph in which a stage is one call, or a dictionary of arms whose first is the control."""
    chosen = {
        "retrieval": retrieval,
        "cascading": reversing("cascading"),
        "ranking": reversing("ranking"),
        **calls,
    }
    arms = {
        stage: call if isinstance(call, dict) else {"a": call} for stage, call in chosen.items()
    }
    return StageGraph(arms, limits, FallbackRetrieval(lambda: popular), breaker=breaker)


def walk(request=None, arms=ARMS, **settings):
    graph = make_graph(**settings)
    return asyncio.run(graph.recommend(request or make_request(), arms))


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
    [
        (failing, "failed (ConnectionError)"),
        (unpublished, "no model is published"),
        (full, "its queue is full"),
        (cancelled_remotely, "failed (CancelledError)"),
    ],
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


RANKED_BY_B = {**ARMS, "ranking": "b"}


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        (failing, "failed (ConnectionError)"),
        (unpublished, "no model is published"),
        (hanging, "no answer within 60 ms"),
    ],
)
def test_the_control_arm_answers_for_a_lost_one(lost, reason):
    limits = {**LIMITS, "ranking": StageLimits(20, 100)}
    result = walk(arms=RANKED_BY_B, limits=limits, ranking={"a": reversing("ranking"), "b": lost})
    ranking = result.stages["ranking"]
    assert (ranking.variant, ranking.fallback_of) == ("a", "b")
    assert result.degraded == (f"ranking: b gave way to the control arm, {reason}",)
    assert result.final.candidates.item_id.tolist() == [21, 22, 23, 24, 25]


def test_without_arm_and_control_the_order_before_stands():
    result = walk(arms=RANKED_BY_B, ranking={"a": failing, "b": failing})
    assert "ranking" not in result.stages
    assert len(result.degraded) == 2
    assert result.final.stage == "cascading"


def test_the_control_arm_can_be_named_and_has_to_exist():
    arms = {"retrieval": {"a": retrieval}, "cascading": {"a": failing}}
    arms["ranking"] = {"a": failing, "b": reversing("ranking")}
    fallback = FallbackRetrieval(PopularItems.empty)
    graph = StageGraph(arms, LIMITS, fallback, control={"ranking": "b"})
    result = asyncio.run(graph.recommend(make_request(), ARMS))
    assert result.stages["ranking"].fallback_of == "a"
    with pytest.raises(ValueError, match="control arm of ranking must be one of"):
        StageGraph(arms, LIMITS, fallback, control={"ranking": "c"})


def test_ranking_is_given_no_more_when_cascading_is_lost():
    seen = []

    async def spying(request: StageRequest) -> StageResult:
        seen.append(len(request.candidates))
        return await reversing("ranking")(request)

    walk(cascading=failing, ranking=spying)
    assert seen == [20]


def test_a_dead_arm_is_left_out_after_some_failures_and_comes_back():
    calls = []

    async def flaky(request: StageRequest) -> StageResult:
        calls.append(request.request_id)
        if len(calls) <= 3:
            raise ConnectionError("replica died")
        return await reversing("ranking")(request)

    async def ask_often() -> None:
        graph = make_graph(
            breaker=BreakerPolicy(failures=3, probe_every_s=0.05),
            ranking={"a": reversing("ranking"), "b": flaky},
        )
        variant = graph.arms_of("ranking").variant("b")
        for _ in range(3):
            await graph.recommend(make_request(), RANKED_BY_B)
        assert variant.breaker_state == "open"
        left_out = await graph.recommend(make_request(), RANKED_BY_B)
        assert len(calls) == 3
        assert "gave way to the control arm" in left_out.degraded[0]
        async with asyncio.timeout(10):
            while variant.breaker_state != "closed":  # a probe has to be due, and to be answered
                result = await graph.recommend(make_request(), RANKED_BY_B)
                assert result.stages["ranking"].fallback_of == "b"
                await asyncio.sleep(0)  # the turn of the probe
        result = await graph.recommend(make_request(), RANKED_BY_B)
        assert (result.degraded, result.stages["ranking"].fallback_of) == ((), "")

    asyncio.run(ask_often())


def test_a_lost_call_counts_once_however_many_requests_it_carried():
    async def lose_a_call_with_many() -> None:
        lost = ConnectionError("replica died")

        async def carried(request: StageRequest) -> StageResult:
            raise lost

        graph = make_graph(breaker=BreakerPolicy(failures=2), ranking=carried)
        variant = graph.arms_of("ranking").variant("a")
        for _ in range(8):
            result = await graph.recommend(make_request(), ARMS)
            assert "failed (ConnectionError)" in result.degraded[0]
        assert variant.breaker_state == "closed"
        lost = ConnectionError("replica died, too")
        await graph.recommend(make_request(), ARMS)
        assert variant.breaker_state == "open"

    asyncio.run(lose_a_call_with_many())


def test_a_full_queue_is_no_reason_to_leave_a_variant_out():
    graph = make_graph(breaker=BreakerPolicy(failures=1), ranking=full)
    asyncio.run(graph.recommend(make_request(), ARMS))
    assert graph.arms_of("ranking").variant("a").breaker_state == "closed"


def test_who_was_given_too_little_time_is_not_blamed():
    limits = {**LIMITS, "ranking": StageLimits(20, 5000, budget_share=0.001)}
    graph = make_graph(limits=limits, breaker=BreakerPolicy(failures=1), ranking=hanging)
    asyncio.run(graph.recommend(make_request(deadline_in_ms=20_000), ARMS))
    assert graph.arms_of("ranking").variant("a").breaker_state == "closed"


def test_a_stage_takes_its_share_of_the_time_left():
    limits = StageLimits(20, 1000, budget_share=0.5)
    assert limits.budget_ms(3000) == 1000
    assert limits.budget_ms(800) == 400


@pytest.mark.parametrize("stage", ["retrieval", "cascading", "ranking"])
def test_a_client_that_goes_away_cancels_the_call(stage):
    async def leave() -> list[str]:
        seen: list[str] = []
        started = asyncio.Event()

        async def waiting(request: StageRequest) -> StageResult:
            started.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                seen.append(stage)
                raise
            raise AssertionError

        graph = make_graph(**{stage: waiting})
        task = asyncio.create_task(graph.recommend(make_request(), ARMS))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert graph.arms_of(stage).variant("a").breaker_state == "closed"
        return seen

    assert asyncio.run(leave()) == [stage]


def test_what_stages_were_asked_is_told():
    asked = walk().asked
    assert list(asked) == ["retrieval", "cascading", "ranking"]
    assert [len(request.candidates) for request in asked.values()] == [0, 40, 20]
    assert asked["ranking"].limit == 5


def test_similar_items_stand_in_for_retrieval_where_something_is_known():
    vectors = np.eye(60, 8, dtype=np.float32) + 0.1
    similar = SimilarItems.small(some_items(60), vectors, POPULAR.popularity)

    async def last_seen(request: StageRequest) -> np.ndarray:
        return np.array([3, 2]) if request.user_id == 1 else np.empty(0, np.int64)

    fallback = FallbackRetrieval(lambda: POPULAR, lambda: similar, last_seen)
    exclude = np.array([5])
    request = make_request()
    found = asyncio.run(fallback.find(replace(request, exclude_item_ids=exclude), "a", 20))
    assert found.source == "similar"
    ids = found.candidates.item_id.tolist()
    assert len(ids) == len(set(ids)) == 20
    assert not {2, 3, 5} & set(ids[0::2][:10])
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    unknown = asyncio.run(fallback.find(replace(request, user_id=2), "a", 20))
    assert unknown.source == "popular"


def test_popular_items_can_be_had_without_any_stage():
    result = make_graph(ranking=failing).popular(make_request(), ARMS)
    assert result.final.candidates.item_id.tolist() == [1, 2, 3, 4, 5]
    assert (list(result.stages), result.degraded) == (["retrieval"], ())
