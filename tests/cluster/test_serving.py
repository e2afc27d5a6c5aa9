"""Serving when things are missing, dead or split in arms, and as `serve run` starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
import ray
import yaml
from ray import serve
from ray.util import list_named_actors
from serving_models import publish_all, publish_model, some_items, wait_until

from app.args import AppArgs
from app.build import RAY_NAMESPACE, build_app
from cache_actors.event_log.catalog import append_items
from cache_actors.event_log.log import EventLog
from cache_actors.home import Home
from cache_actors.log_writer import stop_log_writer
from cache_actors.pool.lifecycle import connect_pool, describe_pool, stop_pool
from cache_actors.registry import ModelRegistry

pytestmark = pytest.mark.cluster

REPO = Path(__file__).resolve().parents[2]
PORT = 18437
SERVE_RUN_PORT = 18438
APP = "marm-serving"
PATIENT = {"timeout_ms": 20_000}
FAST = {"poll_s": 0.1}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    """A home in which nothing has been trained yet."""
    home = Home(tmp_path_factory.mktemp("serving") / "home").create()
    append_items(home.log, some_items())
    return home


@pytest.fixture(scope="module")
def http(ray_cluster, home):
    halves = {"control": 1.0, "untrained": 1.0}
    args = AppArgs.model_validate(
        {
            "home": str(home.path),
            "retrieval": {**PATIENT, "candidates": 40, "variants": {"default": FAST}},
            "cascading": {**PATIENT, "candidates": 20, "variants": {"default": FAST}},
            "ranking": {
                **PATIENT,
                "variants": {"control": {**FAST, "model": "default"}, "untrained": FAST},
            },
            "ingress": {**FAST, "user_config": {"ab": {"salt": "test", "ranking": halves}}},
            "limits": {"deadline_ms": 60_000},
        }
    )
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(build_app(args), name=APP, route_prefix="/")
    with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60) as client:
        yield client
    serve.shutdown()
    stop_pool(connect_pool(home, RAY_NAMESPACE))
    stop_log_writer(home, RAY_NAMESPACE)


def recommend(http, user_id: int) -> dict:
    response = http.post("/recommend", json={"user_id": user_id})
    assert response.status_code == 200, response.text
    return response.json()


def status(http) -> str:
    return http.get("/healthz").json()["status"]


def test_before_the_first_model_the_service_says_what_it_waits_for(http, home):
    response = http.get("/healthz")
    assert response.status_code == 503
    assert response.json()["status"] == "no_model"
    assert "run `marm train`" in response.json()["reason"]
    response = http.post("/recommend", json={"user_id": 1})
    assert response.status_code == 503
    assert "no model of retrieval/default is published" in response.json()["error"]
    stored = http.post("/feedback", json={"user_id": 1, "item_id": 1})
    assert stored.json()["accepted"] == 1
    assert EventLog(home.log).num_events() == 1


def test_stages_join_as_their_models_are_published(http, home):
    registry = ModelRegistry(home.models)
    publish_model(registry, "retrieval")
    wait_until(lambda: status(http) == "degraded")
    answer = recommend(http, 2)
    assert [item["item_id"] for item in answer["items"]] == list(range(1, 21))
    assert len(answer["degraded"]) == 2
    publish_all(home)
    wait_until(lambda: http.get("/healthz").json()["stages"]["ranking/control"]["ready"])
    wait_until(lambda: http.get("/healthz").json()["stages"]["cascading/default"]["ready"])


def test_users_stay_on_their_arm_and_an_arm_without_model_degrades(http):
    for user_id in range(20):
        first, second = recommend(http, user_id), recommend(http, user_id)
        assert first["degraded"] == second["degraded"]
        assert first["items"] == second["items"]
        assert len(first["items"]) == 20
    degraded = [recommend(http, user_id)["degraded"] for user_id in range(20)]
    lost = [reasons for reasons in degraded if reasons]
    assert 0 < len(lost) < 20
    assert all("no model of ranking/untrained is published" in reasons[0] for reasons in lost)


def replica_names(deployment: str) -> list[str]:
    actors = list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if f"{APP}#{deployment}#" in actor["name"]]


@pytest.mark.parametrize("deployment", ["ranking-control", "retrieval-default"])
def test_a_killed_stage_degrades_and_comes_back(http, deployment):
    stage = deployment.split("-")[0]
    user_id = next(user for user in range(50) if not recommend(http, user)["degraded"])
    answers: list[dict] = []
    stop = threading.Event()

    def keep_asking() -> None:
        with httpx.Client(base_url=http.base_url, timeout=60) as client:
            while not stop.is_set():
                response = client.post("/recommend", json={"user_id": user_id})
                answers.append({"status": response.status_code, **response.json()})

    thread = threading.Thread(target=keep_asking)
    thread.start()
    try:
        wait_until(lambda: len(answers) > 2)
        (name,) = replica_names(deployment)
        ray.kill(ray.get_actor(name, namespace="serve"))
        wait_until(lambda: replica_names(deployment) not in ([], [name]), 60)
        asked = len(answers)
        wait_until(lambda: any(not answer["degraded"] for answer in answers[asked:]), 60)
    finally:
        stop.set()
        thread.join()
    assert {answer["status"] for answer in answers} == {200}
    assert all(len(answer["items"]) == 20 for answer in answers)
    reasons = {reason.split(":")[0] for answer in answers for reason in answer["degraded"]}
    assert reasons <= {stage}


def test_a_killed_shard_costs_no_request(http, home):
    user_id = next(user for user in range(50) if not recommend(http, user)["degraded"])
    http.post("/feedback", json={"user_id": user_id, "item_id": 1, "labels": {"click": 1}})
    pool = connect_pool(home, RAY_NAMESPACE)
    for info in describe_pool(pool):
        os.kill(info.pid, signal.SIGKILL)
    assert len(recommend(http, user_id)["items"]) == 20
    event = {"user_id": user_id, "item_id": 2, "timestamp_ms": 5}
    assert http.post("/feedback", json=event).json()["accepted"] == 1
    wait_until(lambda: http.post("/feedback", json=event).json()["degraded"] == [])
    wait_until(lambda: recommend(http, user_id)["stages"]["retrieval"]["rows"]["raw"] == 2)


@pytest.fixture
def serve_run(tmp_path):
    """`serve run` of the shipped config, on another port, with `./marm-home` as its home."""
    config = yaml.safe_load((REPO / "serve_config.yaml").read_text())
    config["http_options"]["port"] = SERVE_RUN_PORT
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    output = (tmp_path / "output.txt").open("wb")
    process = None

    def start() -> subprocess.Popen:
        nonlocal process
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.serve.scripts", "run", "config.yaml"],
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        )
        return process

    yield start
    if process is not None:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    output.close()


def test_serve_run_starts_the_shipped_config(serve_run, tmp_path):
    publish_all(Home(tmp_path / "marm-home").create())
    process = serve_run()
    url = f"http://127.0.0.1:{SERVE_RUN_PORT}"

    def ready() -> bool:
        assert process.poll() is None, (tmp_path / "output.txt").read_text()
        try:
            return httpx.get(f"{url}/healthz").json()["status"] == "ready"
        except (httpx.TransportError, ValueError):
            return False

    wait_until(ready, 120)
    answer = httpx.post(f"{url}/recommend", json={"user_id": 1, "k": 3}, timeout=30).json()
    assert len(answer["items"]) == 3
