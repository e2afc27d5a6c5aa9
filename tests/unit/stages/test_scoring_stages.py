"""Ranking and cascading under their live settings and within their time."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
from pydantic import ValidationError
from serving_models import InProcessReader, make_rows, publish_model, some_items

from cache_actors.registry import ModelRegistry
from marm.memory import Namespace
from stages.assemble import build_cascading, build_ranking
from stages.depth import MARGIN, MIN_OBSERVED
from stages.knobs import CascadingKnobs, RankingKnobs
from stages.request import StageRequest
from stages.turns import TurnMissedError

DEEP = Namespace(depth=3, dim=8)
NOW_MS = 1_000_000
LEFT_MS = 60_000.0


def make_request(num_candidates: int = 30, limit: int = 10, left_ms: float = LEFT_MS):
    return StageRequest(
        request_id="r",
        user_id=5,
        now_ms=NOW_MS,
        before_ms=None,
        context_id=0,
        limit=limit,
        deadline_ms=int(time.time() * 1000 + left_ms),
        candidates=some_items(num_candidates),
    )


class ReadOnly:
    """A memory that can be read and nothing else."""

    def __init__(self, reader: InProcessReader) -> None:
        self.namespace = reader.namespace
        self.fetch_available = reader.fetch_available


@pytest.fixture
def load(tmp_path):
    """Builds a stage whose user 5 has five rows, four of them memorised."""
    registry = ModelRegistry(tmp_path / "models")
    reader = InProcessReader(DEEP)
    rows = make_rows([3, 1, 4, 1, 5], memorised=4, namespace=DEEP)
    rows["memory"][:4] = np.random.default_rng(0).normal(size=(4, 3, 8))
    reader.save_for(5, rows)

    def build(stage: str):
        published = registry.load(
            stage, "default", publish_model(registry, stage, namespace=DEEP, depth=3)
        )
        builder = {"cascading": build_cascading, "ranking": build_ranking}[stage]
        return builder(published, lambda namespace: ReadOnly(reader))

    return build


KNOBS = {"cascading": CascadingKnobs, "ranking": RankingKnobs}
BOTH = pytest.mark.parametrize("stage", ["cascading", "ranking"])


def teach(scorer, num_candidates: int, affordable_depth: int | None, num_rows: int = 5) -> None:
    """Have a scorer believe that within `LEFT_MS` only so much can be computed."""
    depth = 0 if affordable_depth is None else affordable_depth
    affordable = scorer.planner.work.gflop(num_rows, num_candidates, depth)
    taken_ms = LEFT_MS * (2.0 if affordable_depth is None else 0.97) / MARGIN
    for _ in range(MIN_OBSERVED):
        scorer.planner.meter.observe(affordable, taken_ms)


@BOTH
def test_depth_can_be_limited_while_serving(load, stage):
    built, request = load(stage), make_request()
    used = {depth: built.run(request, KNOBS[stage](max_depth=depth)) for depth in (0, 1, 3, 9)}
    assert {depth: result.rows.depth for depth, result in used.items()} == {0: 0, 1: 1, 3: 3, 9: 3}
    assert {result.reason for result in used.values()} == {""}
    np.testing.assert_array_equal(used[9].scores, used[3].scores)
    assert not np.allclose(used[3].scores, used[1].scores, atol=1e-7)


@BOTH
def test_the_history_can_be_shortened_while_serving(load, stage):
    built, request = load(stage), make_request()
    for length, expected in ((0, (0, 0)), (2, (1, 1)), (100, (1, 4)), (None, (1, 4))):
        rows = built.run(request, KNOBS[stage](max_history_length=length)).rows
        assert (rows.raw, rows.memorised) == expected


@BOTH
def test_the_depth_follows_the_time_that_is_left(load, stage):
    built = load(stage)
    teach(built.scorer, 30, affordable_depth=1)
    lower = built.run(make_request(), KNOBS[stage]())
    assert lower.rows.depth == 1
    assert "depth 1 instead of 3" in lower.reason
    np.testing.assert_array_equal(
        lower.scores, built.run(make_request(), KNOBS[stage](max_depth=1)).scores
    )
    # What was just computed took far less than it was believed to, so more is afforded again.
    again = [built.run(make_request(), KNOBS[stage]()).rows.depth for _ in range(30)]
    assert again[-1] == 3


@BOTH
def test_without_time_for_any_rows_candidates_are_scored_all_the_same(load, stage):
    built = load(stage)
    teach(built.scorer, 30, affordable_depth=None)
    result = built.run(make_request(), KNOBS[stage]())
    assert len(result) == 10
    assert (result.rows.depth, result.rows.raw, result.rows.memorised) == (0, 0, 0)
    assert "scored without rows" in result.reason


@BOTH
def test_a_request_whose_turn_does_not_come_in_time_is_not_computed(load, stage):
    built = load(stage)
    computing = built.scorer.turns.turn(time.time() * 1000 + 60_000)
    with computing, pytest.raises(TurnMissedError, match="its time was over"):
        built.run(make_request(left_ms=20), KNOBS[stage]())
    assert len(built.run(make_request(), KNOBS[stage]())) == 10


def test_cascading_narrows_thousands_to_hundreds_in_one_pass(load):
    built = load("cascading")
    passes = []
    score = built.model.score

    def counted(rows, user_id, candidates, now_ms, context_id):
        passes.append(len(candidates))
        return score(rows, user_id, candidates, now_ms, context_id)

    built.model.score = counted
    result = built.run(make_request(5000, limit=500), CascadingKnobs())
    assert passes == [5000]
    assert (len(result), result.num_in) == (500, 5000)
    assert np.all(np.diff(result.scores) <= 0)


def test_ranking_diversifies_and_says_when_it_could_not(load):
    built = load("ranking")
    caps = RankingKnobs(diversity={"kind": "window_caps", "window": 5, "max_per_author": 1})
    result = built.run(make_request(60, limit=20), caps)
    authors = result.candidates.author_id
    assert len(result) == 20
    assert result.reason == ""
    for place in range(len(authors) - 4):
        assert len(set(authors[place : place + 5].tolist())) == 5
    plain = built.run(make_request(60, limit=20), RankingKnobs())
    assert plain.candidates.item_id[0] == result.candidates.item_id[0]
    # Seven authors can't fill a window of ten without repeating one.
    narrow = RankingKnobs(diversity={"kind": "window_caps", "window": 10, "max_per_author": 1})
    relaxed = built.run(make_request(60, limit=20), narrow)
    assert len(relaxed) == 20
    assert re.search(r"caps were exceeded in \d+ of 20 places", relaxed.reason)


def test_ranking_fuses_by_the_configured_formula(load):
    built, request = load("ranking"), make_request()
    powers = {"click": {"beta": 2.0, "alpha": 0.5}, "watch_time": {"beta": 0.1}}
    product = built.run(request, RankingKnobs(fusion={"kind": "power_product", "powers": powers}))
    click, watch = (
        product.task_scores[:, product.tasks.index(task)] for task in ("click", "watch_time")
    )
    np.testing.assert_allclose(product.scores, (0.5 + click) ** 2 * (1 + watch) ** 0.1, rtol=1e-5)
    ranks = built.run(request, RankingKnobs(fusion={"kind": "rank", "weights": {"click": 1.0}}))
    click = ranks.task_scores[:, ranks.tasks.index("click")]
    assert np.all(np.diff(click) <= 0)
    np.testing.assert_allclose(ranks.scores, 1 / (60 + np.arange(1, 11)), rtol=1e-6)


@pytest.mark.parametrize(
    "knobs",
    [
        {"max_depth": -1},
        {"max_history_length": -1},
        {"memory_read_ms": 0},
        {"memory_read_ms": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused(knobs):
    for kind in KNOBS.values():
        with pytest.raises(ValidationError, match=r"greater than|less than"):
            kind(**knobs)
