from __future__ import annotations

import asyncio
import logging
from collections import Counter

import numpy as np
import pytest
from serving_models import some_items

from app.experiments.args import ShadowLimitArgs
from app.experiments.assignment import Assignment
from app.experiments.shadows import ShadowCaller, ShadowCounts
from app.exposures import RecordAnswers
from cache_actors.exposure_log.schema import exposures_to_table
from stages.graph import GraphResult
from stages.request import RowsRead, StageRequest, StageResult

ARMS = {"retrieval": "default", "cascading": "default", "ranking": "l2"}
ITEMS = some_items(4)
TIMEOUTS_MS = dict.fromkeys(ARMS, 5000)


class Sink:
    def __init__(self) -> None:
        self.exposures: list = []
        self.outcomes: Counter[str] = Counter()

    def record(self, exposure) -> bool:
        self.exposures.append(exposure)
        return True

    def count(self, stage, arm, outcome) -> None:
        assert (stage, arm) == ("ranking", "l4")
        self.outcomes[outcome] += 1

    def rows(self) -> list[dict]:
        return exposures_to_table(self.exposures).to_pylist()


def asked(limit: int = 2) -> StageRequest:
    return StageRequest("r1", 7, 1000, None, 0, limit, 2000, candidates=ITEMS)


def scored(variant: str = "l4", version: int = 3) -> StageResult:
    scores = np.array([4, 3, 2, 1], np.float32)
    rows = RowsRead(depth=4)
    return StageResult(
        "ranking", variant, model_version=version, candidates=ITEMS, scores=scores, rows=rows
    )


ANSWER = GraphResult(
    final=StageResult("ranking", "l2"),
    stages={"ranking": scored("l2", version=2)},
    degraded=("cascading: late",),
    asked={"ranking": asked()},
)


def assignment(**more) -> Assignment:
    return Assignment(ARMS, shadows={"ranking": ("l4",)}, **more)


async def answers(request: StageRequest) -> StageResult:
    return scored()


async def fails(request: StageRequest) -> StageResult:
    raise RuntimeError("broken")


async def cancels(request: StageRequest) -> StageResult:
    raise asyncio.CancelledError


async def never(request: StageRequest) -> StageResult:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


def caller(call, sink: Sink, timeouts_ms=TIMEOUTS_MS, **limits) -> ShadowCaller:
    calls = {"ranking": {"l4": call}}
    return ShadowCaller(calls, timeouts_ms, sink, ShadowLimitArgs(**limits), sink.count)


def run_once(call, timeouts_ms=TIMEOUTS_MS, **more) -> dict:
    sink = Sink()

    async def run() -> None:
        shadows = caller(call, sink, timeouts_ms)
        shadows(asked(), assignment(**more), ANSWER, 5.0)
        await shadows.drain()

    asyncio.run(run())
    (row,) = sink.rows()
    return row


def test_an_answer_is_recorded_with_its_arms_experiments_and_versions():
    sink = Sink()
    given = assignment(experiments={"ranking": "depth"}, holdout=False, overridden=("retrieval",))
    RecordAnswers(sink)(asked(), given, ANSWER, 5.0)
    (row,) = sink.rows()
    assert (row["request_id"], row["user_id"], row["time_ms"]) == ("r1", 7, 1000)
    assert (row["latency_ms"], row["degraded"]) == (5.0, ["cascading: late"])
    assert (row["overridden"], row["holdout"]) == (True, False)
    assert (row["ranking_experiment"], row["ranking_arm"]) == ("depth", "l2")
    assert (row["ranking_version"], row["ranking_depth"]) == (2, 4)
    assert (row["cascading_arm"], row["cascading_version"]) == ("default", None)
    assert not row["ranking_shadow"]


def test_a_shadow_is_asked_the_same_and_its_row_is_marked():
    row = run_once(answers, holdout=True, overridden=("ranking",))
    assert row["item_ids"] == ITEMS.item_id[:2].tolist()
    assert row["scores"] == [4.0, 3.0]
    assert (row["request_id"], row["ranking_arm"]) == ("r1", "l4")
    assert (row["ranking_version"], row["ranking_depth"]) == (3, 4)
    assert row["ranking_shadow"]
    assert not row["retrieval_shadow"]
    assert (row["retrieval_arm"], row["retrieval_version"]) == ("default", None)
    assert (row["holdout"], row["overridden"], row["degraded"]) == (True, True, [])


@pytest.mark.parametrize(
    ("call", "timeout_ms", "reason"),
    [
        (fails, 5000, "ranking: failed (RuntimeError)"),
        (cancels, 5000, "ranking: the call was cancelled where it ran"),
        (never, 10, "ranking: no answer within 10 ms"),
    ],
)
def test_a_shadow_that_fails_is_recorded_as_such(call, timeout_ms, reason):
    row = run_once(call, {"ranking": timeout_ms})
    assert (row["item_ids"], row["degraded"], row["ranking_version"]) == ([], [reason], None)
    assert row["ranking_shadow"]


def test_a_stage_that_was_not_reached_has_no_shadow_run():
    sink = Sink()
    shadows = caller(answers, sink)
    shadows(asked(), assignment(), GraphResult(final=StageResult("retrieval", "default")), 5.0)
    assert sink.exposures == []
    assert shadows.counts == ShadowCounts(0, 0)


def test_shadow_runs_are_bounded_and_the_rest_dropped_and_counted(caplog):
    sink = Sink()
    running = most_running = 0

    async def run() -> ShadowCaller:
        released = asyncio.Event()

        async def waits(request: StageRequest) -> StageResult:
            nonlocal running, most_running
            running += 1
            most_running = max(most_running, running)
            await released.wait()
            running -= 1
            return scored()

        shadows = caller(waits, sink, max_running=2, max_waiting=3)
        for _ in range(9):
            shadows(asked(), assignment(), ANSWER, 5.0)
        while running < 2:
            await asyncio.sleep(0)
        released.set()
        await shadows.drain()
        return shadows

    with caplog.at_level(logging.WARNING):
        shadows = asyncio.run(run())
    assert shadows.counts == ShadowCounts(done=5, dropped=4)
    assert most_running == 2
    assert len(sink.exposures) == 5
    assert sink.outcomes == {"ok": 5, "dropped": 4}
    assert "shadow runs were dropped so far, the last of ranking/l4" in caplog.text
