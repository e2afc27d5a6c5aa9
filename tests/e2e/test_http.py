"""The whole service over HTTP: real Serve, real pool, real log, small random models."""

from __future__ import annotations

import json
import threading

import httpx
import numpy as np
import pytest
from ray import serve
from serving_models import NAMESPACE, NUM_ITEMS, publish_all, publish_model, some_items, wait_until

from app.args import AppArgs
from app.build import RAY_NAMESPACE, build_app
from app.schemas import MAX_EVENTS
from cache_actors.event_log.catalog import append_items
from cache_actors.event_log.log import EventLog
from cache_actors.home import Home
from cache_actors.log_writer import stop_log_writer
from cache_actors.pool.client import MemoryClient
from cache_actors.pool.lifecycle import connect_pool, stop_pool
from cache_actors.registry import ModelRegistry
from marm.memory import RAW_STEP

pytestmark = pytest.mark.cluster

PORT = 18431
APP = "marm-e2e-http"
MAX_BODY_BYTES = 200_000
PATIENT = {"timeout_ms": 20_000}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    home = Home(tmp_path_factory.mktemp("http") / "home").create()
    append_items(home.log, some_items())
    publish_all(home)
    return home


@pytest.fixture(scope="module")
def url(ray_cluster, home):
    args = AppArgs.model_validate(
        {
            "home": str(home.path),
            "retrieval": {**PATIENT, "candidates": 40},
            "cascading": {**PATIENT, "candidates": 20},
            "ranking": {
                **PATIENT,
                "variants": {"default": {"poll_s": 0.1}, "clicks": {"model": "default"}},
            },
            "limits": {"deadline_ms": 60_000, "max_k": 50, "max_body_bytes": MAX_BODY_BYTES},
        }
    )
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(build_app(args), name=APP, route_prefix="/")
    yield f"http://127.0.0.1:{PORT}"
    serve.shutdown()
    stop_pool(connect_pool(home, RAY_NAMESPACE))
    stop_log_writer(home, RAY_NAMESPACE)


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, timeout=60) as client:
        wait_until(lambda: client.get("/healthz").json().get("status") == "ready")
        yield client


@pytest.fixture(scope="module")
def memory(http, home):
    return MemoryClient(connect_pool(home, RAY_NAMESPACE), NAMESPACE)


def recommend(http, user_id: int, **body) -> dict:
    response = http.post("/recommend", json={"user_id": user_id, **body})
    assert response.status_code == 200, response.text
    return response.json()


def feedback(http, *events: dict) -> dict:
    response = http.post("/feedback", json={"events": list(events)})
    assert response.status_code == 200, response.text
    return response.json()


def rows_of(memory, user_id: int) -> np.ndarray:
    return memory.fetch(np.array([user_id]), 1000).rows


def test_a_cold_user_gets_ranked_popular_items(http):
    answer = recommend(http, 100, k=5)
    assert len(answer["items"]) == 5
    assert answer["degraded"] == []
    stages = answer["stages"]
    assert list(stages) == ["retrieval", "cascading", "ranking"]
    counts = [(part["candidates_in"], part["candidates_out"]) for part in stages.values()]
    assert counts == [(NUM_ITEMS, 40), (40, 20), (20, 5)]
    assert stages["retrieval"]["source"] == "popular"
    assert {part["model_version"] for part in stages.values()} >= {1}
    assert all(part["memory_depth"] == 0 for part in stages.values())
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    assert 0 < answer["items"][0]["tasks"]["click"] < 1


def test_default_k(http):
    assert len(recommend(http, 100)["items"]) == 20


def test_a_watch_changes_the_next_answer(http):
    before = recommend(http, 101)
    watched = before["items"][0]["item_id"]
    receipt = feedback(
        http,
        {"user_id": 101, "item_id": watched, "labels": {"long_view": 1, "watch_time": 31.5}},
    )
    assert (receipt["accepted"], receipt["degraded"]) == (1, [])
    after = recommend(http, 101)
    assert after["stages"]["retrieval"]["source"] == "retrieval"
    assert after["stages"]["ranking"]["rows"] == {"raw": 1, "memorised": 0}
    assert watched not in [item["item_id"] for item in after["items"]]
    scores = {item["item_id"]: item["score"] for item in before["items"]}
    shared = [item for item in after["items"] if item["item_id"] in scores]
    assert shared
    assert all(item["score"] != scores[item["item_id"]] for item in shared)


def test_memorised_rows_are_used_and_counted(http, memory):
    feedback(http, *({"user_id": 102, "item_id": i, "timestamp_ms": i} for i in (1, 2, 3)))
    rows = rows_of(memory, 102).copy()
    rows["memory"][:2], rows["written_step"][:2] = 1.0, 7
    memory.save(np.full(2, 102), rows[:2]).wait(30)
    ranking = recommend(http, 102)["stages"]["ranking"]
    assert (ranking["memory_depth"], ranking["rows"]) == (1, {"raw": 1, "memorised": 2})


def test_feedback_is_logged_stored_and_idempotent(http, home, memory):
    log = EventLog(home.log)
    before = log.num_events()
    event = {"user_id": 103, "item_id": 4, "event_id": "e-1", "labels": {"like": 1}}
    first = feedback(http, event, {"user_id": 103, "item_id": 999_999, "timestamp_ms": 5})
    assert [receipt["known_item"] for receipt in first["events"]] == [True, False]
    again = feedback(http, event, {"user_id": 103, "item_id": 999_999, "timestamp_ms": 5})
    assert (again["accepted"], again["duplicates"]) == (0, 2)
    assert again["events"][0]["timestamp_ms"] == first["events"][0]["timestamp_ms"]
    assert log.num_events() == before + 2
    rows = rows_of(memory, 103)
    assert rows["item_id"].tolist() == [999_999, 4]  # late events take their place
    assert set(rows["written_step"].tolist()) == {RAW_STEP}
    update = feedback(http, {**event, "labels": {"like": 1, "follow": 1}})
    assert update["accepted"] == 1
    assert len(rows_of(memory, 103)) == 2


def test_a_single_event_and_excluded_items(http):
    response = http.post("/feedback", json={"user_id": 104, "item_id": 1})
    assert response.json()["accepted"] == 1
    exclude = list(range(2, NUM_ITEMS - 4))
    answer = recommend(http, 104, context={"exclude_item_ids": exclude, "context_id": 3})
    assert {item["item_id"] for item in answer["items"]} == set(range(NUM_ITEMS - 4, NUM_ITEMS + 1))


def test_answers_as_of_a_moment_see_only_older_rows(http):
    feedback(http, *({"user_id": 105, "item_id": i, "timestamp_ms": 1000 * i} for i in (1, 2, 3)))
    answer = recommend(http, 105, context={"timestamp_ms": 3000})
    assert answer["stages"]["ranking"]["rows"]["raw"] == 2


BAD_REQUESTS = [
    ("/recommend", b"{broken", 400),
    ("/recommend", b"", 422),
    ("/recommend", b"[]", 422),
    ("/recommend", b"null", 422),
    ("/recommend", b"[" * 100_000, 400),
    ("/recommend", b'{"user_id": ' + b"9" * 5000 + b"}", 400),
    ("/recommend", b"\xff\xfe", 400),
    ("/recommend", {}, 422),
    ("/recommend", {"user_id": -1}, 422),
    ("/recommend", {"user_id": 2**63}, 422),
    ("/recommend", {"user_id": "5"}, 422),
    ("/recommend", {"user_id": 5.0}, 422),
    ("/recommend", {"user_id": True}, 422),
    ("/recommend", {"user_id": None}, 422),
    ("/recommend", {"user_id": 5, "k": 0}, 422),
    ("/recommend", {"user_id": 5, "k": -3}, 422),
    ("/recommend", {"user_id": 5, "k": 51}, 422),
    ("/recommend", {"user_id": 5, "k": 10**12}, 422),
    ("/recommend", {"user_id": 5, "magic": 1}, 422),
    ("/recommend", {"user_id": 5, "context": {"context_id": -1}}, 422),
    ("/recommend", {"user_id": 5, "context": {"magic": 1}}, 422),
    ("/recommend", {"user_id": 5, "context": {"timestamp_ms": 2**62}}, 422),
    ("/recommend", b'{"user_id": 5, "context": {"context_id": NaN}}', 422),
    ("/recommend", b'{"user_id": 5, "context": {"timestamp_ms": -Infinity}}', 422),
    ("/recommend", {"user_id": 5, "context": {"exclude_item_ids": list(range(1001))}}, 422),
    ("/recommend", {"user_id": 5, "context": {"exclude_item_ids": ["a"]}}, 422),
    ("/recommend", b" " * (MAX_BODY_BYTES + 1), 413),
    ("/feedback", b" " * (MAX_BODY_BYTES + 1), 413),
    ("/feedback", b'{"events": [{"user_id": 5', 400),
    ("/feedback", {}, 422),
    ("/feedback", {"events": []}, 422),
    ("/feedback", {"events": {}}, 422),
    ("/feedback", {"events": [{"user_id": 5, "item_id": 1}] * (MAX_EVENTS + 1)}, 422),
    ("/feedback", {"events": [{"user_id": 5, "item_id": 1}, {"user_id": 5}]}, 422),
    ("/feedback", {"user_id": 5, "item_id": -1}, 422),
    ("/feedback", {"user_id": 5, "item_id": 2**63}, 422),
    ("/feedback", {"user_id": 5, "item_id": 1, "magic": 1}, 422),
    ("/feedback", {"user_id": 5, "item_id": 1, "timestamp_ms": -1}, 422),
    ("/feedback", {"user_id": 5, "item_id": 1, "timestamp_ms": 2**62}, 422),
    ("/feedback", {"user_id": 5, "item_id": 1, "event_id": ""}, 422),
    ("/feedback", {"user_id": 5, "item_id": 1, "event_id": "x" * 129}, 422),
    ("/feedback", b'{"user_id": 5, "item_id": 1, "event_id": "\\ud800"}', 422),
    ("/feedback", {"user_id": 5, "item_id": 1, "labels": {"magic": 1}}, 422),
    ("/feedback", {"user_id": 5, "item_id": 1, "labels": {"like": 2}}, 422),
    ("/feedback", {"user_id": 5, "item_id": 1, "labels": {"like": 0.5}}, 422),
    ("/feedback", {"user_id": 5, "item_id": 1, "labels": {"watch_time": -1}}, 422),
    ("/feedback", b'{"user_id": 5, "item_id": 1, "labels": {"watch_time": NaN}}', 422),
    ("/feedback", b'{"user_id": 5, "item_id": 1, "labels": {"watch_time": 1e999}}', 422),
    ("/nowhere", {}, 404),
]


def test_bad_input_is_refused_clearly_and_stores_nothing(http, home, memory):
    def stored() -> tuple:
        versions = ModelRegistry(home.models).versions("ranking", "default")
        return EventLog(home.log).num_events(), memory.stats().rows, versions

    before = stored()
    for path, body, expected in BAD_REQUESTS:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = http.post(path, content=content, headers={"content-type": "application/json"})
        shown = f"{path} {content[:80]!r}: {response.status_code} {response.text[:300]}"
        assert response.status_code == expected, shown
        assert response.json()["error"], shown
    assert stored() == before
    assert recommend(http, 5)["stages"]["ranking"]["rows"]["raw"] == 0


def test_errors_say_where_and_what(http):
    body = {"events": [{"user_id": 5, "item_id": 1}, {"user_id": -5, "item_id": 1}]}
    problem = http.post("/feedback", json=body).json()
    assert problem["details"] == [
        {
            "where": "batch.events.1.user_id",
            "problem": "Input should be greater than or equal to 0",
        }
    ]
    plain = http.post(
        "/recommend", content=b'{"user_id": 5}', headers={"content-type": "text/plain"}
    )
    assert plain.status_code == 422
    assert "Content-Type: application/json" in plain.json()["error"]
    assert http.get("/recommend").status_code == 405


def test_a_chunked_body_is_limited_too(http):
    chunks = (b" " * 10_000 for _ in range(MAX_BODY_BYTES // 10_000 + 1))
    response = http.post("/feedback", content=chunks, headers={"content-type": "application/json"})
    assert response.status_code == 413


def test_health_shows_the_memory_pool(http):
    memory = http.get("/healthz").json()["memory"]
    assert memory["shards"] == memory["answering"] == memory["warm"] > 0
    assert (memory["pool"], memory["problem"]) == ("default", "")


def test_docs_and_request_ids(http):
    paths = http.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/recommend", "/feedback", "/healthz"}
    assert http.get("/docs").status_code == 200
    response = http.post("/recommend", json={"user_id": 1}, headers={"x-request-id": "abc-1"})
    assert response.json()["request_id"] == "abc-1"


def test_new_versions_go_live_under_load_and_a_damaged_one_does_not(http, url, home):
    registry = ModelRegistry(home.models)
    statuses, versions = [], []
    stop = threading.Event()

    def keep_asking(user_id: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not stop.is_set():
                response = client.post("/recommend", json={"user_id": user_id})
                statuses.append(response.status_code)
                answer = response.json()
                versions.append(answer["stages"]["ranking"]["model_version"])
                statuses.extend(answer["degraded"])

    threads = [threading.Thread(target=keep_asking, args=(user,)) for user in (301, 302)]
    for thread in threads:
        thread.start()
    try:
        for seed in (11, 12):
            version = publish_model(registry, "ranking", seed)
            wait_until(lambda version=version: version in versions)
        damaged = publish_model(registry, "ranking", 13)
        path = registry.load("ranking", "default", damaged).path / "model.safetensors"
        path.write_bytes(b"broken")
        wait_until(lambda: "was refused" in http.get("/healthz").json()["reason"])
        asked = len(versions)
        wait_until(lambda: len(versions) > asked + 5)
        assert versions[-1] == version
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(statuses) == {200}
    assert http.get("/healthz").json()["status"] == "degraded"
    publish_model(registry, "ranking", 14)
    wait_until(lambda: http.get("/healthz").json()["status"] == "ready")
