"""Serving when things are missing, dead or split in arms, and as `serve run` starts it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.client import HTTPConnection
from pathlib import Path

import httpx
import numpy as np
import pytest
import ray
import yaml
from ray import serve
from ray.util import list_named_actors
from serving_models import (
    NAMESPACE,
    make_rows,
    publish_all,
    publish_model,
    some_items,
    wait_until,
)
from slow_stage import slow_stage
from typer.testing import CliRunner

from app.args import AppArgs
from app.build import RAY_NAMESPACE, build_app
from app.cli import demo
from app.cli.main import cli_app
from app.ingress import Ingress
from app.serving_audit.run import AuditSize, ServingAudit
from app.stage_calls import stage_call
from cache_actors.event_log.catalog import append_items
from cache_actors.event_log.log import EventLog
from cache_actors.exposure_log.reader import read_exposures
from cache_actors.home import Home
from cache_actors.log_writer import stop_log_writer
from cache_actors.pool.client import MemoryClient
from cache_actors.pool.lifecycle import connect_pool, describe_pool, stop_pool
from cache_actors.registry import ModelRegistry
from cache_actors.transfer.pool_memory import PoolMemory
from stages.grouped_calls import GroupLimits
from stages.request import StageRequest, StageResult
from stages.variant import QueueFullError

pytestmark = pytest.mark.cluster

REPO = Path(__file__).resolve().parents[2]
APP = "marm-serving"
PATIENT = {"timeout_ms": 20_000}
FAST = {"poll_s": 0.1}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    """A home in which nothing has been trained yet."""
    home = Home(tmp_path_factory.mktemp("serving") / "home").create()
    append_items(home.log, some_items())
    return home


def app_args(home: Home, passed_on: int = 20) -> AppArgs:
    halves = {"stage": "ranking", "arms": {"control": 0.5, "untrained": 0.5}}
    return AppArgs.model_validate(
        {
            "home": str(home.path),
            "retrieval": {**PATIENT, "candidates": 40, "variants": {"default": FAST}},
            "cascading": {**PATIENT, "candidates": passed_on, "variants": {"default": FAST}},
            "ranking": {
                **PATIENT,
                "variants": {"control": {**FAST, "model": "default"}, "untrained": FAST},
            },
            "ingress": FAST,
            "routing": {"salt": "test", "experiments": {"halves": halves}},
            "load": {"breaker": {"probe_every_s": 0.2}},
            "limits": {"deadline_ms": 60_000},
        }
    )


@pytest.fixture(scope="module")
def http(ray_cluster, home):
    port = demo.free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_app(app_args(home)), name=APP, route_prefix="/")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield client
    serve.shutdown()
    stop_pool(connect_pool(home, RAY_NAMESPACE))
    stop_log_writer(home, RAY_NAMESPACE)


@pytest.fixture(scope="module")
def trained(http, home) -> None:
    """The service has models of all stages, whichever tests came before."""
    versions = publish_all(home)
    arms = {"retrieval": "default", "cascading": "default", "ranking": "control"}

    def live() -> bool:
        stages = http.get("/healthz").json()["stages"]
        found = {stage: stages[f"{stage}/{arm}"]["model_version"] for stage, arm in arms.items()}
        return found == versions

    wait_until(live)


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


@pytest.mark.usefixtures("trained")
def test_users_stay_on_their_arm_and_the_control_stands_in_for_one_without_model(http):
    for user_id in range(20):
        first, second = recommend(http, user_id), recommend(http, user_id)
        assert first["degraded"] == second["degraded"]
        assert first["items"] == second["items"]
        assert len(first["items"]) == 20
        assert first["stages"]["ranking"]["variant"] == "control"
    answers = [recommend(http, user_id) for user_id in range(20)]
    lost = [answer for answer in answers if answer["degraded"]]
    assert 0 < len(lost) < 20
    for answer in lost:
        assert "no model of ranking/untrained is published" in answer["degraded"][0]
        assert answer["stages"]["ranking"]["fallback_of"] == "untrained"
        assert answer["arms"]["ranking"] == "untrained"


@pytest.mark.usefixtures("trained")
def test_served_scores_equal_offline_ones(http, home):
    pool = connect_pool(home, RAY_NAMESPACE)
    rng = np.random.default_rng(0)
    with MemoryClient(pool, NAMESPACE) as memory:
        for user_id in range(100, 106):
            rows = make_rows(rng.integers(1, 60, 24).tolist(), 20)
            rows["memory"][:20] = rng.standard_normal(rows["memory"][:20].shape)
            memory.save(np.full(len(rows), user_id), rows).wait(30)
    arms = {"control": {"model": "default"}, "untrained": {}}
    args = AppArgs.model_validate({"ranking": {"variants": arms}})
    with PoolMemory(pool) as whole:
        audit = ServingAudit(args, home, whole, AuditSize(num_users=8, num_items=12))
        for report in (audit.of_application(str(http.base_url)), audit.of_stages()):
            assert report.passed, report.to_dict()
            assert report.pairs > 100
            assert all(arm.arm.arm != "untrained" for arm in report.arms)
    assert {arm.arm.stage for arm in report.arms} == {"retrieval", "cascading", "ranking"}


@pytest.mark.usefixtures("trained")
def test_a_rollback_is_followed_without_a_lost_request(http, home):
    def live() -> int:
        return http.get("/healthz").json()["stages"]["ranking/control"]["model_version"]

    def marm_models(*args: str) -> dict:
        result = CliRunner().invoke(cli_app, ["models", *args, "--home", str(home.path)])
        return json.loads(result.stdout)

    before = live()
    newest = publish_model(ModelRegistry(home.models), "ranking", seed=1)
    wait_until(lambda: live() == newest)
    assert recommend(http, 1)["stages"]["ranking"]["model_version"] == newest
    rolled = marm_models("rollback", "ranking", "default")
    assert (rolled["rolled_back"], rolled["pinned"]) == (newest, before)
    wait_until(lambda: live() == before)
    assert recommend(http, 1)["stages"]["ranking"]["model_version"] == before
    marm_models("unpin", "ranking", "default")
    wait_until(lambda: live() == newest)


def replica_names(deployment: str) -> list[str]:
    actors = list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if f"{APP}#{deployment}#" in actor["name"]]


@pytest.mark.usefixtures("trained")
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


@pytest.mark.usefixtures("trained")
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


@pytest.mark.usefixtures("trained")
def test_new_arguments_replace_the_edge_under_load_and_no_request_fails(http, home):
    answers: list[tuple[int, int]] = []
    stop = threading.Event()

    def keep_asking() -> None:
        with httpx.Client(base_url=http.base_url, timeout=60) as client:
            while not stop.is_set():
                response = client.post("/recommend", json={"user_id": 1})
                stages = response.json()["stages"] if response.status_code == 200 else {}
                passed_on = stages.get("cascading", {}).get("candidates_out", 0)
                answers.append((response.status_code, passed_on))

    threads = [threading.Thread(target=keep_asking) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: (200, 20) in answers)
        serve.run(build_app(app_args(home, passed_on=21)), name=APP, route_prefix="/")
        wait_until(lambda: (200, 21) in answers, 60)
        asked = len(answers)
        wait_until(lambda: len(answers) > asked + 10)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(answers) == {(200, 20), (200, 21)}


def test_what_nobody_waits_for_is_cancelled_in_the_replica_and_a_full_queue_is_told(http, tmp_path):
    handle = serve.run(slow_stage(tmp_path), name="slow", route_prefix=None)
    call = stage_call(handle, GroupLimits(calls=8), lambda result: None)
    happened = partial(sign_of, tmp_path)

    def start(name: str) -> asyncio.Task:
        return asyncio.create_task(call(patient_request(name)))

    async def come_and_go() -> StageResult:
        first = start("first")
        await happened("started first")
        second = start("second")
        await happened("came second")
        third = start("third")  # waits at the caller, for the replica takes two
        await asyncio.sleep(0)  # it goes first
        with pytest.raises(QueueFullError):
            await start("fourth")
        for waiting in (second, third):
            waiting.cancel()
        await happened("cancelled second")
        (tmp_path / "go").touch()
        return await first

    assert asyncio.run(come_and_go()).variant == "slow"
    serve.delete("slow")
    told = {path.name for path in tmp_path.iterdir()}
    assert told == {"go", "came first", "started first", "came second", "cancelled second"}


def test_requests_that_share_a_call_are_answered_apart_and_cancelled_together(tmp_path):
    handle = serve.run(slow_stage(tmp_path), name="shared", route_prefix=None)
    observed = []
    call = stage_call(handle, GroupLimits(calls=1, waiting=4), observed.append)
    happened = partial(sign_of, tmp_path)

    async def start(*names: str) -> list[asyncio.Task]:
        tasks = [asyncio.create_task(call(patient_request(name))) for name in names]
        await asyncio.sleep(0)  # each asks before anything else goes on
        return tasks

    async def share() -> None:
        (first,) = await start("first")
        await happened("started first")
        stays, leaves, never = await start("stays", "leaves", "never")
        never.cancel()  # while it waits at the caller
        (tmp_path / "go first").touch()
        assert (await first).variant == "slow"
        await happened("started stays")
        leaves.cancel()  # the call goes on for who stays
        (tmp_path / "go stays").touch()
        await happened("started leaves")
        (tmp_path / "go leaves").touch()
        assert (await stays).variant == "slow"
        one, other = await start("one", "other")  # nothing is under way, so they go at once
        await happened("started one")
        await happened("came other")
        one.cancel()
        other.cancel()  # nobody is left
        await happened("cancelled one")
        await happened("cancelled other")
        (tmp_path / "go").touch()

    asyncio.run(share())
    serve.delete("shared")
    assert len(observed) == 3
    names = {path.name for path in tmp_path.iterdir()}
    assert not names & {"came never", "cancelled stays", "cancelled leaves", "started other"}


async def sign_of(directory: Path, name: str) -> None:
    """Wait until the slow stage has told of something."""
    async with asyncio.timeout(30):
        while not (directory / name).exists():
            await asyncio.sleep(0.01)


def patient_request(name: str) -> StageRequest:
    return StageRequest(name, 1, 1, None, 0, 5, int(time.time() * 1000) + 60_000)


@pytest.mark.usefixtures("trained")
def test_a_client_that_hangs_up_is_worked_for_no_longer(http, home, tmp_path):
    args = AppArgs.model_validate(
        {
            "home": str(home.path),
            "retrieval": {**PATIENT, "candidates": 40},
            "cascading": {**PATIENT, "candidates": 20},
            "ranking": {**PATIENT, "variants": {"slow": {"calls_under_way": 2}}},
            "ingress": {"drain_poll_s": 0.1},
            "limits": {"deadline_ms": 60_000},
        }
    )
    handles = {
        stage: {"default": serve.get_deployment_handle(f"{stage}-default", APP)}
        for stage in ("retrieval", "cascading")
    }
    handles["ranking"] = {"slow": slow_stage(tmp_path)}
    edge = serve.deployment(name="edge", **args.ingress.deployment_options())(Ingress)
    pool = connect_pool(home, RAY_NAMESPACE)
    serve.run(edge.bind(args, home, pool, handles), name="slow-edge", route_prefix="/slow")

    def ask(name: str) -> HTTPConnection:
        client = HTTPConnection("127.0.0.1", http.base_url.port, timeout=60)
        headers = {"content-type": "application/json", "x-request-id": name}
        client.request("POST", "/slow/recommend", json.dumps({"user_id": 1}), headers)
        return client

    stays = ask("stays")
    wait_until((tmp_path / "started stays").exists)
    goes = ask("goes")
    wait_until((tmp_path / "came goes").exists)
    goes.close()
    wait_until((tmp_path / "cancelled goes").exists)
    (tmp_path / "go").touch()
    answer = json.loads(stays.getresponse().read())
    assert answer["stages"]["ranking"]["variant"] == "slow"
    stays.close()
    serve.delete("slow-edge")
    assert not (tmp_path / "started goes").exists()


@pytest.fixture
def serve_run(tmp_path, free_port):
    """`serve run` of the shipped config, on another port, with `./marm-home` as its home."""
    config = yaml.safe_load((REPO / "serve_config.yaml").read_text())
    config["http_options"]["port"] = free_port
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
            env={**os.environ, "RAY_ADDRESS": "local"},  # a Ray of its own
            # Where tests run in the background, Ctrl-C is ignored, and children inherit that.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        return process

    yield start
    if process is not None and process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    output.close()


def test_serve_run_starts_the_shipped_config_and_exposures_outlive_it(
    serve_run, tmp_path, free_port
):
    home = Home(tmp_path / "marm-home").create()
    publish_all(home)
    process = serve_run()
    url = f"http://127.0.0.1:{free_port}"

    def ready() -> bool:
        assert process.poll() is None, (tmp_path / "output.txt").read_text()
        try:
            return httpx.get(f"{url}/healthz").json()["status"] == "ready"
        except (httpx.TransportError, ValueError):
            return False

    wait_until(ready, 120)
    answer = httpx.post(f"{url}/recommend", json={"user_id": 1, "k": 3}, timeout=30).json()
    assert len(answer["items"]) == 3
    process.send_signal(signal.SIGINT)
    process.wait(60)
    (row,) = read_exposures(home.exposures).to_pylist()
    assert row["request_id"] == answer["request_id"]
    assert row["item_ids"] == [item["item_id"] for item in answer["items"]]
