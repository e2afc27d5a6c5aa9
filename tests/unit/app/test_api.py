"""The HTTP interface in one process: real stages, log and memory, without Ray."""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack
from functools import partial

import httpx
import numpy as np
import pytest
from fastapi import HTTPException, Request
from serving_models import InProcessReader, publish_all, some_items

from app.admission import Admission, AdmissionPolicy
from app.api import create_api, single_or_batch
from app.args import AppArgs
from app.experiments.table import experiment_table
from app.feedback import FeedbackService
from app.guards import RouteGuards
from app.schemas import MemoryHealth
from app.service import Service, now_ms
from cache_actors.event_log.log import EventLog
from cache_actors.group_commit import CommitQueue, GroupCommitter, RecentReports
from cache_actors.home import Home
from cache_actors.registry import ModelRegistry
from cache_actors.transfer.restore_mark import restore_awaited, restoring
from marm.items import ItemCatalog
from stages.assemble import build_cascading, build_ranking, build_retrieval
from stages.fallback import FallbackRetrieval
from stages.graph import StageGraph
from stages.knobs import CascadingKnobs, RankingKnobs, RetrievalKnobs
from stages.live_model import LiveModel
from stages.popular import PopularItems
from stages.server import StageServer

LOGGER = logging.getLogger("test-api")
ANYONE = RouteGuards()


class Edge:
    """Everything that serves one home, in this process."""

    def __init__(self, home: Home, args: AppArgs, guards: RouteGuards = ANYONE) -> None:
        self.reader = InProcessReader()
        self.log = EventLog(home.log)
        self._committer = GroupCommitter(self.log, RecentReports.of_log(self.log))
        self.log_is_down = False
        registry = ModelRegistry(home.models)
        builders = {
            "retrieval": (lambda p: build_retrieval(p, self._open, "exact"), RetrievalKnobs),
            "cascading": (lambda p: build_cascading(p, self._open), CascadingKnobs),
            "ranking": (lambda p: build_ranking(p, self._open), RankingKnobs),
        }
        self.servers = {}
        for stage, (build, knobs) in builders.items():
            live = LiveModel(registry, stage, "default", build, LOGGER)
            live.poll()
            self.servers[stage] = StageServer(stage, "default", live, knobs)
        calls = {stage: {"default": self._call(server)} for stage, server in self.servers.items()}
        catalog = ItemCatalog(some_items())
        self.answered: list[tuple] = []
        self.outcomes: list[tuple[str, str]] = []
        self.admission = Admission(AdmissionPolicy(max_concurrent=4))
        self.feedback_admission = Admission(AdmissionPolicy(max_concurrent=4))
        self.service = Service(
            graph=StageGraph(calls, args.stage_limits(), FallbackRetrieval(PopularItems.empty)),
            experiments=experiment_table(args.routing, args.arms(), {}),
            feedback=FeedbackService(self, lambda: catalog, self._stores, timeout_s=5.0),
            statuses=self._statuses,
            limits=args.limits,
            restore_awaited=partial(restore_awaited, home.memory, required=False),
            admission=self.admission,
            feedback_admission=self.feedback_admission,
            after_answer=[self._fail_to_follow, lambda *told: self.answered.append(told)],
            on_outcome=lambda route, outcome, ms: self.outcomes.append((route, outcome)),
        )
        self.api = create_api(self.service, args.limits.max_body_bytes, guards)

    async def append(self, events) -> list[bool]:
        if self.log_is_down:
            raise OSError("no space left on device")
        return await CommitQueue(self._committer, interval_ms=1).append(events)

    def request(self, method: str, path: str, **more) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.api)
            async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
                return await client.request(method, path, **more)

        return asyncio.run(send())

    def _open(self, namespace) -> InProcessReader:
        return self.reader

    async def _stores(self) -> dict:
        return {self.reader.namespace: self.reader}

    async def _statuses(self) -> list:
        return [server.status() for server in self.servers.values()]

    @staticmethod
    def _fail_to_follow(*told) -> None:
        raise KeyError("what follows an answer costs the request nothing")

    @staticmethod
    def _call(server: StageServer):
        async def call(request):
            return server.run(request)

        return call


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home").create()


@pytest.fixture
def edge(home):
    publish_all(home)
    return Edge(home, AppArgs())


def test_feedback_changes_the_next_answer(edge):
    first = edge.request("POST", "/recommend", json={"user_id": 1}).json()
    watched = first["items"][0]["item_id"]
    body = {"user_id": 1, "item_id": watched, "labels": {"long_view": 1, "watch_time": 20}}
    assert edge.request("POST", "/feedback", json=body).json()["accepted"] == 1
    second = edge.request("POST", "/recommend", json={"user_id": 1}).json()
    assert watched not in [item["item_id"] for item in second["items"]]
    assert second["stages"]["ranking"]["rows"] == {"raw": 1, "memorised": 0}
    assert second["stages"]["retrieval"]["source"] == "retrieval"


def test_health_tells_of_the_memory(edge):
    said = MemoryHealth(pool="default", shards=2, answering=2, warm=1, problem="")
    edge.service._memory_health = lambda: said
    health = edge.request("GET", "/healthz").json()
    assert (health["status"], health["memory"]) == ("ready", said.model_dump())
    lost = said.model_copy(update={"answering": 1, "problem": "1 of 2 memory shards do not answer"})
    edge.service._memory_health = lambda: lost
    health = edge.request("GET", "/healthz")
    assert (health.status_code, health.json()["status"]) == (200, "degraded")
    assert health.json()["reason"] == lost.problem


def test_health_follows_the_models(edge, home, tmp_path):
    assert edge.request("GET", "/healthz").json()["status"] == "ready"
    age = ("newest_event_ms", "newest_event_age_s")
    ranking = edge.request("GET", "/healthz").json()["stages"]["ranking/default"]
    assert [ranking[name] for name in age] == [None, None]  # its publisher did not say
    registry = ModelRegistry(home.models)
    published = registry.load("ranking", "default", 1)
    learned = {"model": published.config["model"], "newest_event_ms": now_ms() - 60_000}
    registry.publish("ranking", "default", published.tensors, learned)
    edge.servers["ranking"]._live.poll()
    ranking = edge.request("GET", "/healthz").json()["stages"]["ranking/default"]
    assert ranking["newest_event_ms"] == learned["newest_event_ms"]
    assert ranking["newest_event_age_s"] >= 60
    empty = Edge(Home(tmp_path / "empty").create(), AppArgs())
    health = empty.request("GET", "/healthz")
    assert (health.status_code, health.json()["status"]) == (503, "no_model")
    refused = empty.request("POST", "/recommend", json={"user_id": 1})
    assert refused.status_code == 503
    assert "no model of retrieval/default is published" in refused.json()["error"]


def test_readiness_waits_for_a_restore(edge, home):
    with restoring(home.memory, "s3://bucket/warm"):
        health = edge.request("GET", "/healthz")
        assert (health.status_code, health.json()["status"]) == (503, "restoring")
        assert "restored from s3://bucket/warm" in health.json()["reason"]
        answer = edge.request("POST", "/recommend", json={"user_id": 1})
        assert answer.status_code == 200  # who asks is answered
    assert edge.request("GET", "/healthz").json()["status"] == "ready"


def test_when_the_log_is_down_nothing_is_stored_and_the_client_is_told(edge):
    edge.log_is_down = True
    response = edge.request("POST", "/feedback", json={"user_id": 1, "item_id": 2})
    assert response.status_code == 503
    assert "no space left on device" in response.json()["error"]
    assert len(edge.reader.memory.fetch(np.array([1]), 10).rows) == 0
    assert edge.log.num_events() == 0


def test_a_dead_shard_is_told_and_answers_go_on(edge):
    edge.request("POST", "/feedback", json={"user_id": 1, "item_id": 2})
    edge.reader.down = True
    answer = edge.request("POST", "/recommend", json={"user_id": 1, "k": 5}).json()
    assert len(answer["items"]) == 5
    assert answer["stages"]["retrieval"]["source"] == "popular"
    assert answer["degraded"] == [
        f"{stage}: the user's memory shard did not answer"
        for stage in ("retrieval", "cascading", "ranking")
    ]
    event = {"user_id": 1, "item_id": 3}
    assert (
        "did not take the rows"
        in edge.request("POST", "/feedback", json=event).json()["degraded"][0]
    )


def test_limits_of_the_deployment_are_told(home):
    publish_all(home)
    edge = Edge(home, AppArgs.model_validate({"limits": {"max_k": 30, "max_body_bytes": 2000}}))
    refused = edge.request("POST", "/recommend", json={"user_id": 1, "k": 31})
    assert (refused.status_code, refused.json()["error"]) == (422, "k must be at most 30, got 31")
    too_large = edge.request("POST", "/feedback", content=b" " * 2001)
    assert too_large.status_code == 413
    assert "at most 2000 bytes" in too_large.json()["error"]


def test_a_body_of_unknown_length_is_limited(home):
    edge = Edge(home, AppArgs.model_validate({"limits": {"max_body_bytes": 2000}}))

    async def chunks():
        for _ in range(5):
            yield b" " * 500

    assert edge.request("POST", "/feedback", content=chunks()).status_code == 413


def test_a_future_time_is_refused_by_entry(edge):
    events = [{"user_id": 1, "item_id": 2}, {"user_id": 1, "item_id": 2, "timestamp_ms": 2**60}]
    response = edge.request("POST", "/feedback", json={"events": events})
    assert response.status_code == 422
    assert "(entry 1)" in response.json()["error"]
    assert edge.log.num_events() == 0


def test_bodies_are_told_apart_by_their_events():
    assert single_or_batch({"events": []}) == "batch"
    assert single_or_batch({"user_id": 1}) == "event"
    assert single_or_batch([1]) == "event"


def test_who_listens_is_told_of_every_answer(edge):
    answer = edge.request("POST", "/recommend", json={"user_id": 7, "k": 3}).json()
    ((request, assignment, result, latency_ms),) = edge.answered
    assert (request.user_id, request.request_id) == (7, answer["request_id"])
    assert assignment.arms == dict.fromkeys(("retrieval", "cascading", "ranking"), "default")
    assert [item["item_id"] for item in answer["items"]] == result.final.candidates.item_id.tolist()
    assert latency_ms > 0
    assert answer["depth"] == 0
    assert edge.outcomes == [("recommend", "ok")]


def test_overload_is_refused_with_the_time_to_try_again(edge):
    with ExitStack() as inside:
        for _ in range(4):
            inside.enter_context(edge.admission.admitted(1000))
            inside.enter_context(edge.feedback_admission.admitted(1000))
        refused = edge.request("POST", "/recommend", content=b"{not even parsed")
        unstored = edge.request("POST", "/feedback", json={"user_id": 1, "item_id": 2})
    for response in (refused, unstored):
        assert response.status_code == 429
        assert "4 requests are in work already" in response.json()["error"]
        assert int(response.headers["retry-after"]) >= 1
        assert int(response.headers["retry-after-ms"]) >= 100
    assert edge.request("POST", "/recommend", json={"user_id": 1}).status_code == 200
    assert edge.outcomes == [
        ("recommend", "overloaded"),
        ("feedback", "overloaded"),
        ("recommend", "ok"),
    ]
    assert edge.log.num_events() == 0


def test_outcomes_are_counted_by_what_went_wrong(edge, home, tmp_path):
    edge.request("POST", "/recommend", json={"user_id": 1, "k": 999})
    edge.reader.down = True
    edge.request("POST", "/recommend", json={"user_id": 1})
    edge.log_is_down = True
    edge.request("POST", "/feedback", json={"user_id": 1, "item_id": 2})
    assert edge.outcomes == [
        ("recommend", "refused"),
        ("recommend", "degraded"),
        ("feedback", "unavailable"),
    ]


def test_a_guard_stands_in_front_of_its_routes(home):
    async def nobody(request: Request) -> None:
        raise HTTPException(401, "a key is needed", headers={"WWW-Authenticate": "ApiKey"})

    publish_all(home)
    edge = Edge(home, AppArgs(), RouteGuards(feedback=nobody))
    refused = edge.request("POST", "/feedback", json={"user_id": 1, "item_id": 2})
    assert (refused.status_code, refused.json()["error"]) == (401, "a key is needed")
    assert refused.headers["www-authenticate"] == "ApiKey"
    assert edge.request("POST", "/recommend", json={"user_id": 1}).status_code == 200


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "0.5", "1.0"])
@pytest.mark.parametrize("field", ["context_id", "timestamp_ms"])
def test_context_is_finite_whole_numbers(edge, field, value):
    content = f'{{"user_id": 1, "context": {{"{field}": {value}}}}}'
    headers = {"content-type": "application/json"}
    response = edge.request("POST", "/recommend", content=content, headers=headers)
    assert response.status_code == 422
    assert response.json()["details"][0]["where"] == f"context.{field}"


def test_an_allow_list_is_exclusive_at_every_stage(edge):
    def ask(**context) -> httpx.Response:
        return edge.request("POST", "/recommend", json={"user_id": 1, "context": context})

    allowed = [3, 9, 27, 10**12]
    answer = ask(allow_item_ids=allowed, exclude_item_ids=[9]).json()
    assert sorted(item["item_id"] for item in answer["items"]) == [3, 27]
    assert answer["degraded"] == []
    nothing = ask(allow_item_ids=[10**12])
    assert (nothing.status_code, nothing.json()["items"]) == (200, [])
    assert "the allow and block lists leave no item" in nothing.json()["degraded"][0]
    for refused in ([], [-1], ["3"], [1.5], list(range(10_001)), 3):
        assert ask(allow_item_ids=refused).status_code == 422
