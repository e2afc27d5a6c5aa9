"""The closed loop over HTTP: ask, watch, tell, ask again."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

_READY_TIMEOUT_S = 60.0
_TIMEOUT_S = 30.0


class DemoError(RuntimeError):
    """The running service did not do what it promises; the message says what."""


@dataclass(frozen=True)
class ServingReport:
    """What serving did."""

    stage_ms: dict[str, float]  # median per stage, and of the whole request
    memory_depth: dict[str, int]  # deepest that was used, by stage
    feedback_changed_next_answer: bool


def try_serving(base_url: str, user_ids: list[int], requests_per_user: int = 5) -> ServingReport:
    """Ask for recommendations of ``user_ids``, then let the first of them watch something.

    Raises:
        DemoError: when the service does not become ready or answers with an error.
    """
    with httpx.Client(base_url=base_url, timeout=_TIMEOUT_S) as client:
        _await_ready(client)
        times: dict[str, list[float]] = {}
        depths: dict[str, int] = {}
        for user_id in user_ids:
            for _ in range(requests_per_user):
                started = time.perf_counter()
                answer = _recommend(client, user_id)
                times.setdefault("request", []).append((time.perf_counter() - started) * 1000)
                for stage, report in answer["stages"].items():
                    times.setdefault(stage, []).append(report["ms"])
                    depths[stage] = max(depths.get(stage, 0), report["memory_depth"])
        medians = {name: round(float(np.median(ms)), 1) for name, ms in times.items()}
        return ServingReport(medians, depths, feedback_changes_answer(client, user_ids[0]))


def feedback_changes_answer(client: httpx.Client, user_id: int) -> bool:
    """Whether a posted watch changes how the user's next answer scores the other items.

    The watched item itself may well be hidden as seen, which proves nothing; that the row was read
    shows in the scores of everything else. Asking twice without a watch must change nothing.
    """
    before, again = _recommend(client, user_id), _recommend(client, user_id)
    if ranking_of(before) != ranking_of(again):
        raise DemoError(f"user {user_id} got two different answers though nothing happened between")
    watched = before["items"][0]["item_id"]
    event = {
        "user_id": user_id,
        "item_id": watched,
        "event_id": f"demo-{time.time_ns()}",
        "labels": {"click": 1, "long_view": 1, "like": 1, "watch_time": 45.0},
    }
    response = client.post("/feedback", json=event)
    if response.status_code != httpx.codes.OK:
        raise DemoError(f"feedback was answered {response.status_code}: {response.text}")
    after = _recommend(client, user_id)
    if after["stages"]["ranking"]["rows"]["raw"] <= before["stages"]["ranking"]["rows"]["raw"]:
        return False
    scores = {item["item_id"]: item["score"] for item in before["items"]}
    return any(
        item["score"] != scores[item["item_id"]]
        for item in after["items"]
        if item["item_id"] in scores and item["item_id"] != watched
    )


def ranking_of(answer: dict[str, Any]) -> list[int]:
    """Items of an answer, best first."""
    return [item["item_id"] for item in answer["items"]]


def _recommend(client: httpx.Client, user_id: int) -> dict[str, Any]:
    response = client.post("/recommend", json={"user_id": user_id, "k": 20})
    if response.status_code != httpx.codes.OK:
        raise DemoError(f"a request was answered {response.status_code}: {response.text}")
    answer: dict[str, Any] = response.json()
    return answer


def _await_ready(client: httpx.Client) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while True:
        health = client.get("/healthz").json()
        if health["status"] == "ready":
            return
        if time.monotonic() > deadline:
            raise DemoError(f"the service is not ready after {_READY_TIMEOUT_S:.0f} s: {health}")
        time.sleep(0.2)
