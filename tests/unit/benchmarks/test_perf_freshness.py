"""The parts of the freshness benchmark that need no service."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import httpx
import numpy as np
import pytest
from sample_events import make_events
from serving_models import InProcessReader, make_rows

from benchmarks.perf.freshness import Settings, parse_options, settings_of, title_of
from benchmarks.perf.freshness_run.follower import FollowSettings, places_in_log
from benchmarks.perf.freshness_run.posting import LoadSettings, Poster
from benchmarks.perf.freshness_run.waits import (
    Answer,
    LogPlace,
    Post,
    RowSeen,
    covers,
    has_learned,
    wait_figures,
    waits_for_models,
    waits_for_rows,
)
from benchmarks.perf.freshness_run.watching import AnswerWatch, RowWatch, Watcher
from benchmarks.perf.serving_load.world import VARIANT, WorldSettings
from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.registry import ModelRegistry
from marm.addressing import NUM_BUCKETS
from stages.request import STAGES
from train.config import TrainConfig


def offsets_at(segment: int, rows: int) -> LogOffsets:
    return LogOffsets(np.tile(np.array([segment, rows]), (NUM_BUCKETS, 1)))


def test_a_model_has_learned_what_lies_before_its_offsets(tmp_path: Path) -> None:
    """Of every prefix of a log of several segments, in which users share buckets."""
    log = EventLog(tmp_path / "log")
    events = make_events(40, num_users=5)
    for start in range(0, 40, 8):
        log.append(events.take(slice(start, start + 8)))
    places = places_in_log(log)
    assert len(places) == 40
    reader = log.reader(LogOffsets.start())
    learned: set[int] = set()
    while (batch := reader.next(3)) is not None:
        learned |= set(batch.event_key.tolist())
        found = {key for key, place in places.items() if has_learned(reader.offsets, place)}
        assert found == learned
        assert covers(reader.offsets, log.end()) == (len(learned) == 40)


def test_waits_end_when_the_row_is_there_and_when_it_is_computed() -> None:
    posts = [Post(1, 10, 5.0, 5.3), Post(2, 20, 6.0, 6.1), Post(3, 30, 7.0, 7.1)]
    seen = {10: RowSeen(5.25, 6.0), 20: RowSeen(6.5)}
    receipt, visible, computed = waits_for_rows(posts, seen)
    np.testing.assert_allclose(receipt, [0.3, 0.1, 0.1])
    np.testing.assert_allclose(visible, [0.25, 0.5, np.nan])
    np.testing.assert_allclose(computed, [1.0, np.nan, np.nan])


def test_a_model_is_fresh_with_the_first_answer_of_all_stages_that_have_learned_the_post() -> None:
    posts = [Post(1, 10, 1.0, 1.1), Post(1, 20, 2.0, 2.1), Post(1, 30, 3.0, 3.1)]
    places = {10: LogPlace(7, 1, 1), 20: LogPlace(7, 1, 2), 30: LogPlace(7, 9, 1)}
    learned = {
        ("retrieval", 2): offsets_at(1, 1),
        ("ranking", 2): offsets_at(1, 1),
        ("ranking", 3): offsets_at(2, 0),  # the whole segment
        ("retrieval", 3): offsets_at(2, 0),
    }
    answers = [
        Answer(0.5, (("retrieval", 1), ("ranking", 1))),
        Answer(4.0, (("retrieval", 1), ("ranking", 2))),  # version 1 says nothing
        Answer(8.0, (("retrieval", 2), ("ranking", 3))),
        Answer(6.0, (("retrieval", 2), ("ranking", 2))),
        Answer(9.0, (("ranking", 3),)),  # retrieval had no part in it
        Answer(9.5, (("retrieval", 3), ("ranking", 3))),
    ]
    both = waits_for_models(posts, places, answers, learned, ("retrieval", "ranking"))
    np.testing.assert_allclose(both, [5.0, 7.5, np.nan])
    ranking = waits_for_models(posts, places, answers, learned, ("ranking",))
    np.testing.assert_allclose(ranking, [3.0, 6.0, np.nan])


def test_figures_are_of_the_waits_that_ended() -> None:
    figures = wait_figures("row", "what", np.array([*range(1, 12), np.nan], np.float64))
    values = {figure.key: figure.ratio.value for figure in figures}
    assert values == {"row_s": 6.0, "row_p90_s": 10.0, "row_max_s": 11.0}
    assert (figures[0].ratio.lower_quartile, figures[0].ratio.upper_quartile) == (3.5, 8.5)
    with pytest.raises(ValueError, match="none of 2 posts arrived: what"):
        wait_figures("row", "what", np.full(2, np.nan))


def test_every_setting_of_the_follower_reaches_the_training() -> None:
    follow = FollowSettings(32, 9.0, 0.5, 0.05)
    config = follow.config(Settings().world)
    assert config.follow
    assert [model.stage for model in config.models] == ["ranking", "cascading", "retrieval"]
    for field in fields(FollowSettings):
        assert getattr(config, field.name) == getattr(follow, field.name)
        assert getattr(FollowSettings(), field.name) == getattr(TrainConfig(), field.name)


def test_options_set_what_the_title_shows() -> None:
    assert settings_of(parse_options([])) == Settings()
    options = "--posts 9 --posts-per-s 3 --batch-size 8 --publish-interval-s 7 --seed 4"
    more = "--caught-up-interval-s 1.5 --follow-poll-s 0.1 --model-poll-s 0.25"
    settings = settings_of(parse_options([*options.split(), *more.split()]))
    assert settings.follow == FollowSettings(8, 7.0, 1.5, 0.1)
    assert (settings.load.posts, settings.load.posts_per_s, settings.load.seed) == (9, 3.0, 4)
    assert settings.service.model_poll_s == 0.25
    title = title_of(settings)
    for shown in ("9 posts, 3/s", "batches of 8", "0.1 s", "1.5 s", "7 s", "0.25 s"):
        assert shown in title
    quick = settings_of(parse_options(["--quick"]))
    assert quick.follow == FollowSettings()
    assert quick.load.posts < Settings().load.posts


@dataclass
class Edge(httpx.BaseTransport):
    """Answers as the service does where all stages are of one version."""

    version: int = 1
    status: int = 200
    refusals: int = 0  # that come first

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if self.refusals:
            self.refusals -= 1
            return httpx.Response(429, request=request)
        reports = {stage: {"model_version": self.version} for stage in STAGES}
        return httpx.Response(self.status, json={"stages": reports}, request=request)


def test_rows_are_noted_when_they_are_there_and_when_they_are_computed() -> None:
    memory = InProcessReader()
    watch = RowWatch(memory)
    watch.look()  # nothing is awaited
    rows = make_rows([4, 5])
    keys = rows["event_key"].tolist()
    for key in keys:
        watch.expect(7, key)
    watch.look()
    assert watch.num_awaited == 2
    memory.save_for(7, rows)
    watch.look()
    first = {key: watch.seen[key].visible_s for key in keys}
    assert np.isfinite(list(first.values())).all()
    assert watch.num_awaited == 2
    rows["written_step"][1] = 0  # of the first step of a run
    memory.save_for(7, rows)
    watch.look()
    assert watch.num_awaited == 1
    assert {key: watch.seen[key].visible_s for key in keys} == first
    assert np.isnan(watch.seen[keys[0]].computed_s)
    assert watch.seen[keys[1]].computed_s >= first[keys[1]]


def test_answers_are_noted_with_what_their_versions_have_learned(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path)
    for stage in STAGES:
        weights = {"w": np.zeros(1, np.float32)}
        registry.publish(stage, VARIANT, weights, {"step": 0})
        registry.publish(stage, VARIANT, weights, {"log_offsets": offsets_at(3, 0).to_dict()})
    edge = Edge()
    with httpx.Client(transport=edge, base_url="http://edge") as client:
        watch = AnswerWatch(client, registry, [1, 2], 5)
        watch.look()
        assert not watch.have_learned(LogOffsets.start())
        edge.version = 2
        watch.look()
        assert watch.have_learned(offsets_at(3, 0))
        assert not watch.have_learned(offsets_at(3, 1))
        edge.status = 503
        watch.look()
        assert [each.versions[0] for each in watch.answers] == [("retrieval", 1), ("retrieval", 2)]
        edge.status = 422
        with pytest.raises(RuntimeError, match="was answered 422"):
            watch.look()


def test_a_refused_post_is_sent_again_as_the_same_event() -> None:
    rows, world = RowWatch(InProcessReader()), WorldSettings(num_users=3)
    with httpx.Client(transport=Edge(refusals=1), base_url="http://edge") as client:
        poster = Poster(client, world, rows, LoadSettings())
        posts = poster.post_many(2, per_s=1e6)
        assert poster.repeats == 1
        assert {post.event_key for post in posts} == set(rows.seen)
        assert len(rows.seen) == 2
    with httpx.Client(transport=Edge(status=422), base_url="http://edge") as client:
        poster = Poster(client, world, rows, LoadSettings())
        with pytest.raises(RuntimeError, match="was answered 422"):
            poster.post()


def test_a_watcher_that_fails_says_so_where_the_block_ends() -> None:
    def fail() -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"), Watcher(fail, 0.0) as watcher:
        watcher._thread.join(30)
