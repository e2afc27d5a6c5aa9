from __future__ import annotations

import asyncio

import pytest

from app.errors import OverloadedError, RefusedError, UnavailableError
from app.outcomes import counted, outcome_of
from app.serving_metrics import stand_ins
from stages.graph import GraphResult
from stages.request import StageRequest, StageResult

REQUEST = StageRequest("r", 1, 1, None, 0, 5, 1)


def result(asked: str, **stages: StageResult) -> GraphResult:
    names = {"R": "retrieval", "C": "cascading", "K": "ranking"}
    return GraphResult(
        final=StageResult("ranking", "a"),
        stages=stages,
        asked={names[letter]: REQUEST for letter in asked},
    )


def answer(stage: str, version: int | None = 1, **more) -> StageResult:
    return StageResult(stage, "a", model_version=version, **more)


def test_what_stood_in_for_lost_stages():
    whole = {stage: answer(stage) for stage in ("retrieval", "cascading", "ranking")}
    assert stand_ins(result("RCK", **whole)) == {}
    lost = {
        "retrieval": answer("retrieval", None, source="similar"),
        "ranking": answer("ranking", fallback_of="b"),
    }
    expected = {"retrieval": "similar", "cascading": "none", "ranking": "control"}
    assert stand_ins(result("RCK", **lost)) == expected


def test_stages_that_nobody_asked_are_not_lost():
    popular = answer("retrieval", None, source="popular")
    assert stand_ins(result("", retrieval=popular)) == {}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (OverloadedError("full", 1.0), "overloaded"),
        (UnavailableError("no model"), "unavailable"),
        (RefusedError("k"), "refused"),
        (asyncio.CancelledError(), "cancelled"),
        (KeyError("a bug"), "failed"),
    ],
)
def test_every_request_is_counted_once(error, outcome):
    told = []
    with (
        pytest.raises(type(error)),
        counted("recommend", lambda route, outcome, ms: told.append((route, outcome))),
    ):
        raise error
    assert told == [("recommend", outcome)]
    assert outcome_of(error) == outcome
