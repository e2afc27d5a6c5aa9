"""Answers of a service with two ranking arms whose memories differ in depth and width."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import httpx
import numpy as np
import pytest
from serving_models import NAMESPACE, InProcessReader, publish_all, publish_model, some_items

from app.api import create_api
from app.args import AppArgs
from app.experiments.live import LiveRouting
from app.experiments.shadows import ShadowCaller
from app.exposures import RecordAnswers, exposure_writer
from app.feedback import FeedbackService
from app.service import Service
from cache_actors.exposure_log.reader import read_exposures
from cache_actors.home import Home
from cache_actors.registry import ModelRegistry
from marm.items import ItemCatalog
from stages.assemble import build_cascading, build_ranking, build_retrieval
from stages.fallback import FallbackRetrieval
from stages.graph import StageGraph
from stages.knobs import CascadingKnobs, RankingKnobs, RetrievalKnobs
from stages.live_model import LiveModel
from stages.popular import PopularItems
from stages.server import StageServer

LOGGER = logging.getLogger("test-routed-answers")
DEEP = replace(NAMESPACE, depth=2, dim=16)
EXPERIMENT = {"stage": "ranking", "arms": {"default": 0.5, "marm-l4": 0.5}}
BUILDERS = {
    "retrieval": (build_retrieval, RetrievalKnobs),
    "cascading": (build_cascading, CascadingKnobs),
    "ranking": (build_ranking, RankingKnobs),
}


class RoutedEdge:
    """One home served in this process, by two ranking arms."""

    def __init__(self, home: Home, routing: dict) -> None:
        variants = {"default": {}, "marm-l4": {}}
        limits = {"deadline_ms": 60_000}
        args = AppArgs.model_validate(
            {"ranking": {"variants": variants}, "routing": routing, "limits": limits}
        )
        self.home = home
        self.readers = {found: InProcessReader(found) for found in (NAMESPACE, DEEP)}
        self.servers = {
            stage: {name: self._server(stage, name) for name in names}
            for stage, names in args.arms().items()
        }
        calls = {
            stage: {name: self._call(server) for name, server in by_name.items()}
            for stage, by_name in self.servers.items()
        }
        popular = PopularItems.ranked(some_items(), np.linspace(1, 0, 60, dtype=np.float32))
        self.routing = LiveRouting(args.routing, args.arms())
        self._exposures = exposure_writer(home, args.routing.exposures)
        self._shadows = ShadowCaller(
            calls, dict.fromkeys(calls, 5000), self._exposures, args.routing.shadow_limits
        )
        service = Service(
            graph=StageGraph(calls, args.stage_limits(), FallbackRetrieval(lambda: popular)),
            experiments=self.routing,
            feedback=FeedbackService(
                self, lambda: ItemCatalog(some_items()), self._stores, timeout_s=5.0
            ),
            statuses=self._statuses,
            limits=args.limits,
            settings_problem=lambda: self.routing.problem,
            after_answer=[RecordAnswers(self._exposures), self._shadows],
        )
        self._api = create_api(service, args.limits.max_body_bytes)

    def exposures(self) -> list[dict]:
        """All rows; nothing may be asked afterwards."""
        self._exposures.close()
        return read_exposures(self.home.exposures).to_pylist()

    def request(self, method: str, path: str, **more) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self._api)
            async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
                response = await client.request(method, path, **more)
                await self._shadows.drain()
                return response

        return asyncio.run(send())

    def recommend(self, user_id: int, arms: str | None = None) -> httpx.Response:
        headers = {} if arms is None else {"X-MARM-Arms": arms}
        body = {"user_id": user_id, "k": 5}
        return self.request("POST", "/recommend", json=body, headers=headers)

    async def append(self, events) -> list[bool]:
        return [True] * len(events)

    def _server(self, stage, name) -> StageServer:
        build, knobs = BUILDERS[stage]
        live = LiveModel(
            ModelRegistry(self.home.models),
            stage,
            name,
            lambda published: build(published, self.readers.__getitem__),
            LOGGER,
        )
        live.poll()
        return StageServer(stage, name, live, knobs)

    async def _stores(self) -> dict:
        return self.readers

    async def _statuses(self) -> list:
        return [server.status() for by_name in self.servers.values() for server in by_name.values()]

    @staticmethod
    def _call(server: StageServer):
        async def call(request):
            return server.run(request)

        return call


@pytest.fixture
def home(tmp_path) -> Home:
    home = Home(tmp_path / "home").create()
    publish_all(home)
    registry = ModelRegistry(home.models)
    for seed in (5, 6):
        publish_model(registry, "ranking", seed, "marm-l4", namespace=DEEP)
    return home


def test_arms_with_memories_of_their_own_serve_side_by_side(home):
    edge = RoutedEdge(home, {"experiments": {"depth": EXPERIMENT}})
    event = {"item_id": 3, "labels": {"long_view": 1}}
    for user_id in range(12):
        edge.request("POST", "/feedback", json={"user_id": user_id, **event})
    answers = [edge.recommend(user_id).json() for user_id in range(12)]
    assert {answer["arms"]["ranking"] for answer in answers} == {"default", "marm-l4"}
    for answer in answers:
        ranking = answer["stages"]["ranking"]
        assert answer["degraded"] == []
        assert answer["experiments"] == {"ranking": "depth"}
        assert ranking["variant"] == answer["arms"]["ranking"]
        assert ranking["model_version"] == {"default": 1, "marm-l4": 2}[ranking["variant"]]
        assert ranking["rows"]["raw"] == 1  # feedback went to both memories
    rows = edge.exposures()
    assert [row["user_id"] for row in rows] == list(range(12))
    for row, answer in zip(rows, answers, strict=True):
        assert row["request_id"] == answer["request_id"]
        assert row["item_ids"] == [item["item_id"] for item in answer["items"]]
        assert (row["ranking_experiment"], row["retrieval_experiment"]) == ("depth", "")
        assert row["ranking_arm"] == answer["arms"]["ranking"]
        assert row["ranking_version"] == answer["stages"]["ranking"]["model_version"]


def test_overrides_are_marked_or_refused(home):
    routing = {"experiments": {"depth": EXPERIMENT}, "overrides": {"user_ids": [42]}}
    edge = RoutedEdge(home, routing)
    for arm in ("default", "marm-l4"):
        answer = edge.recommend(42, f"ranking={arm}").json()
        assert answer["stages"]["ranking"]["variant"] == arm
        assert (answer["overridden"], answer["experiments"]) == (["ranking"], {})
    refused = edge.recommend(1, "ranking=marm-l4")
    assert refused.status_code == 403
    assert "not allowed for user 1" in refused.json()["error"]
    for header, message in (("ranking=magic", "has the arms"), ("ranking", "must be like")):
        refused = edge.recommend(42, header)
        assert refused.status_code == 422
        assert message in refused.json()["error"]
    assert [row["overridden"] for row in edge.exposures()] == [True, True]


def test_shadow_arms_leave_rows_and_answers_as_they_were(home):
    plain = RoutedEdge(home, {}).recommend(1).json()
    edge = RoutedEdge(home, {"shadows": {"ranking": {"arms": ["marm-l4"]}}})
    answer = edge.recommend(1).json()
    assert answer["items"] == plain["items"]
    shown, shadow = sorted(edge.exposures(), key=lambda row: row["ranking_shadow"])
    assert (shown["ranking_arm"], shown["ranking_shadow"]) == ("default", False)
    assert (shadow["ranking_arm"], shadow["ranking_version"]) == ("marm-l4", 2)
    assert shadow["request_id"] == shown["request_id"] == answer["request_id"]
    assert len(shadow["item_ids"]) == 5


def test_a_holdout_of_popular_items_asks_no_stage(home):
    edge = RoutedEdge(home, {"holdout": {"share": 1.0, "serves": "popular"}})
    answer = edge.recommend(1).json()
    assert [item["item_id"] for item in answer["items"]] == [1, 2, 3, 4, 5]
    assert (answer["holdout"], answer["degraded"]) == (True, [])
    assert list(answer["stages"]) == ["retrieval"]
    (row,) = edge.exposures()
    assert (row["holdout"], row["ranking_version"]) == (True, None)


def test_refused_live_settings_show_in_the_health_report(home):
    edge = RoutedEdge(home, {"experiments": {"depth": EXPERIMENT}})
    before = edge.recommend(1).json()["arms"]
    edge.routing.reconfigure({"experiments": {"depth": {"arms": {"default": 0.5, "marm-l4": 0.6}}}})
    assert edge.recommend(1).json()["arms"] == before
    health = edge.request("GET", "/healthz")
    assert (health.status_code, health.json()["status"]) == (200, "degraded")
    assert "must sum to 1" in health.json()["reason"]
