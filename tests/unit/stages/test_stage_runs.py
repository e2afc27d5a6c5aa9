"""Each stage over a random model and an in-process memory."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import numpy as np
import pytest
from serving_models import (
    NUM_ITEMS,
    InProcessReader,
    make_rows,
    publish_model,
    some_items,
)

from cache_actors.registry import ModelRegistry
from marm.items import ItemFeatures
from stages.assemble import build_cascading, build_ranking, build_retrieval
from stages.knobs import CascadingKnobs, RankingKnobs, RetrievalKnobs
from stages.live_model import LiveModel
from stages.request import StageRequest
from stages.server import StageServer

NOW_MS = 1_000_000


def make_request(user_id: int = 5, limit: int = 10, **changes) -> StageRequest:
    return StageRequest(
        **{
            "request_id": "r",
            "user_id": user_id,
            "now_ms": NOW_MS,
            "before_ms": None,
            "context_id": 0,
            "limit": limit,
            "deadline_ms": int(time.time() * 1000) + 60_000,
            **changes,
        }
    )


@pytest.fixture
def reader():
    return InProcessReader()


@pytest.fixture
def load(tmp_path, reader):
    """Builds the stage of a freshly published version."""
    registry = ModelRegistry(tmp_path / "models")

    def build(stage: str, seed: int = 0):
        published = registry.load(stage, "default", publish_model(registry, stage, seed))
        if stage == "retrieval":
            return build_retrieval(published, lambda namespace: reader, "exact")
        builder = {"cascading": build_cascading, "ranking": build_ranking}[stage]
        return builder(published, lambda namespace: reader)

    return build


def test_a_user_without_rows_gets_popular_items(load):
    result = load("retrieval").run(
        make_request(limit=3, exclude_item_ids=np.array([2])), RetrievalKnobs()
    )
    assert result.source == "popular"
    assert result.candidates.item_id.tolist() == [1, 3, 4]
    assert (result.rows.raw, result.rows.memorised, result.rows.depth) == (0, 0, 0)


def test_retrieval_leaves_out_seen_blocked_and_excluded_items(load, reader):
    stage = load("retrieval")
    reader.save_for(5, make_rows([1, 2, 3]))
    request = make_request(limit=NUM_ITEMS, exclude_item_ids=np.array([7]))
    found = stage.run(request, RetrievalKnobs(blocked_item_ids=(9,)))
    assert found.source == "retrieval"
    assert set(range(1, NUM_ITEMS + 1)) - set(found.candidates.item_id.tolist()) == {1, 2, 3, 7, 9}
    assert np.all(np.diff(found.scores) <= 0)
    assert found.num_in == NUM_ITEMS
    seen_too = stage.run(request, RetrievalKnobs(filter_seen=False))
    assert len(seen_too) == NUM_ITEMS - 1


def test_retrieval_fills_its_limit_although_items_are_hidden(load, reader):
    reader.save_for(5, make_rows(list(range(1, 11))))
    assert len(load("retrieval").run(make_request(limit=20), RetrievalKnobs())) == 20


def test_when_all_items_were_seen_they_are_shown_again(load, reader):
    reader.save_for(5, make_rows(list(range(1, 11))))
    exclude = np.arange(11, NUM_ITEMS + 1)
    result = load("retrieval").run(make_request(exclude_item_ids=exclude), RetrievalKnobs())
    assert sorted(result.candidates.item_id.tolist()) == list(range(1, 11))
    assert "seen before" in result.reason


@pytest.mark.parametrize("stage", ["cascading", "ranking"])
def test_all_candidates_at_once_equal_one_by_one(load, reader, stage):
    built = load(stage)
    knobs = {"cascading": CascadingKnobs(), "ranking": RankingKnobs()}[stage]
    reader.save_for(5, make_rows([3, 1, 4, 1, 5], memorised=3))
    items = some_items(30)
    together = built.run(make_request(candidates=items, limit=30), knobs)
    assert together.num_in == 30
    assert np.all(np.diff(together.scores) <= 0)
    for position, item_id in enumerate(together.candidates.item_id.tolist()):
        alone = built.run(
            make_request(candidates=items.take(np.array([item_id - 1])), limit=1), knobs
        )
        assert alone.scores[0] == pytest.approx(together.scores[position], abs=1e-5)


def test_ranking_answers_tasks_and_truncates(load, reader):
    reader.save_for(5, make_rows([3, 1]))
    result = load("ranking").run(make_request(candidates=some_items(30), limit=4), RankingKnobs())
    assert len(result) == 4
    assert result.task_scores.shape == (4, len(result.tasks))
    columns = [result.tasks.index(task) for task in ("long_view", "like", "watch_time")]
    fused = result.task_scores[:, columns] @ np.array([1.0, 0.5, 0.02])
    np.testing.assert_allclose(result.scores, fused, rtol=1e-5)


def test_depth_is_zero_unless_a_memorised_row_was_read(load, reader):
    stage = load("ranking")
    request = make_request(candidates=some_items(3))
    reader.save_for(5, make_rows([3, 1]))
    rows = stage.run(request, RankingKnobs()).rows
    assert (rows.raw, rows.memorised, rows.depth) == (2, 0, 0)
    reader.save_for(5, make_rows([3, 1], memorised=1))
    rows = stage.run(request, RankingKnobs()).rows
    assert (rows.raw, rows.memorised, rows.depth) == (1, 1, 1)


def test_a_dead_shard_means_no_rows_not_an_error(load, reader):
    reader.save_for(5, make_rows([3, 1], memorised=2))
    reader.down = True
    for stage, knobs in [("retrieval", RetrievalKnobs()), ("ranking", RankingKnobs())]:
        result = load(stage).run(make_request(candidates=some_items(3)), knobs)
        assert len(result)
        assert result.rows.missing
        assert (result.rows.raw, result.rows.memorised, result.rows.depth) == (0, 0, 0)


def test_time_travel_reads_only_older_rows(load, reader):
    reader.save_for(5, make_rows([3, 1, 4], start_ms=1000))
    rows = load("retrieval").run(make_request(before_ms=3000), RetrievalKnobs()).rows
    assert rows.raw == 2


def test_a_new_row_changes_the_scores(load, reader):
    stage = load("ranking")
    request = make_request(candidates=some_items(10))
    before = stage.run(request, RankingKnobs())
    reader.save_for(5, make_rows([3]))
    assert not np.allclose(before.task_scores, stage.run(request, RankingKnobs()).task_scores)


def test_rows_from_a_clock_ahead_count(load, reader):
    reader.save_for(5, make_rows([3], start_ms=NOW_MS + 50))
    result = load("ranking").run(make_request(candidates=some_items(3)), RankingKnobs())
    assert result.rows.raw == 1


def test_a_never_seen_item_is_scored(load):
    strange = ItemFeatures(*(np.array([value], np.int64) for value in (2**62, 0, 0, 0)))
    assert len(load("ranking").run(make_request(candidates=strange), RankingKnobs())) == 1


def make_server(tmp_path, reader) -> tuple[StageServer, LiveModel, ModelRegistry]:
    registry = ModelRegistry(tmp_path / "models")
    live = LiveModel(
        registry,
        "ranking",
        "default",
        lambda published: build_ranking(published, lambda namespace: reader),
        logging.getLogger("test"),
    )
    return StageServer("ranking", "arm-b", live, RankingKnobs), live, registry


def test_server_without_a_model_says_so_and_then_serves(tmp_path, reader):
    server, live, registry = make_server(tmp_path, reader)
    request = make_request(candidates=some_items(3))
    live.poll()
    refused = server.run(request)
    assert (refused.outcome, len(refused)) == ("no_model", 0)
    assert "no model of ranking/default is published" in refused.reason
    assert not server.status().ready
    publish_model(registry, "ranking")
    live.poll()
    result = server.run(request)
    assert (result.outcome, result.variant, result.model_version) == ("ok", "arm-b", 1)
    assert result.elapsed_ms > 0
    assert server.status().namespace == reader.namespace


def test_server_does_no_work_for_a_late_request(tmp_path, reader):
    server, live, registry = make_server(tmp_path, reader)
    publish_model(registry, "ranking")
    live.poll()
    assert server.run(make_request(candidates=some_items(3), deadline_ms=1)).outcome == "late"


def test_server_says_of_a_request_whose_turn_did_not_come_that_it_was_late(tmp_path, reader):
    server, live, registry = make_server(tmp_path, reader)
    publish_model(registry, "ranking")
    assert live.poll()
    now_ms = int(time.time() * 1000)
    with live.current.scorer.turns.turn(now_ms + 60_000):
        result = server.run(make_request(candidates=some_items(3), deadline_ms=now_ms + 50))
    assert (result.outcome, len(result), result.num_in) == ("late", 0, 3)
    assert "its time was over" in result.reason


def test_a_request_that_fails_is_an_answer_so_that_others_of_its_call_are_answered(
    tmp_path, reader, caplog
):
    server, live, registry = make_server(tmp_path, reader)
    publish_model(registry, "ranking")
    assert live.poll()
    request = make_request(candidates=some_items(3))
    broken = replace(request, user_id=None)
    with pytest.raises(TypeError):
        server.run(broken)
    failed = server.answer(broken)
    assert (failed.outcome, failed.num_in, len(failed)) == ("failed", 3, 0)
    assert failed.reason == "failed (TypeError)"
    assert "ranking/arm-b" in caplog.text
    assert "TypeError" in caplog.text
    assert server.answer(request).scores.tolist() == server.run(request).scores.tolist()


def test_knobs_change_live_and_bad_ones_change_nothing(tmp_path, reader):
    server, live, registry = make_server(tmp_path, reader)
    publish_model(registry, "ranking")
    publish_model(registry, "ranking", seed=1)
    live.poll()
    request = make_request(candidates=some_items(10))
    before = server.run(request)
    with pytest.raises(ValueError, match="user_config of ranking/arm-b"):
        server.reconfigure({"fusion": {"magic": 1.0}})
    with pytest.raises(ValueError, match="Extra inputs"):
        server.reconfigure({"magic": 1.0})
    server.reconfigure({})
    # Serve ends a replica whose reconfiguration raises, so one that serves only reports.
    server.reconfigure({"fusion": {"magic": 1.0}})
    assert "settings before stay in force" in server.status().problem
    assert server.run(request).scores.tolist() == before.scores.tolist()
    server.reconfigure({"fusion": {"click": 1.0}, "model_version": 1})
    live.poll()
    assert server.status().problem == ""
    after = server.run(request)
    assert after.model_version == 1
    click = after.task_scores[:, after.tasks.index("click")]
    np.testing.assert_allclose(after.scores, click, rtol=1e-6)
