"""Requests over HTTP with connections that stay open: so many at a time, or so many a second."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import aiohttp
import numpy as np

from benchmarks.perf.serving_load.answers import NO_ANSWER, NO_VERSION, OK, Answer

REQUEST_TIMEOUT_S = 60.0
"""When the client gives up; far beyond any deadline of the service."""

_PROBLEM_LENGTH = 200
_LONGEST_PAUSE_S = 1.0


@dataclass(frozen=True)
class ClosedLoop:
    """Each of ``concurrency`` clients sends its next request when its last was answered, and after
    the time that a refusal asked for."""

    concurrency: int
    seconds: float = math.inf
    requests: int | None = None  # of all clients together; None: no limit


@dataclass(frozen=True)
class OpenLoop:
    """Requests come at random moments, ``per_s`` in the mean, however many are unanswered."""

    per_s: float
    seconds: float
    seed: int = 0


Load = ClosedLoop | OpenLoop


@dataclass(frozen=True)
class Target:
    """Where requests go, and for whom: users in turn."""

    url: str
    user_ids: tuple[int, ...]
    shown: int

    def bodies(self) -> list[bytes]:
        """A request body for each user."""
        return [
            json.dumps({"user_id": user_id, "k": self.shown}).encode() for user_id in self.user_ids
        ]


class HttpLoad:
    """Sends requests to one target and notes every answer."""

    def __init__(self, target: Target, session: aiohttp.ClientSession) -> None:
        self._target = target
        self._session = session
        self._bodies = target.bodies()
        self._sent = 0

    async def run(self, load: Load, stop: asyncio.Event) -> list[Answer]:
        """All answers of ``load``, which ends early when ``stop`` is set."""
        if isinstance(load, ClosedLoop):
            return await self._closed(load, stop)
        return await self._open(load, stop)

    async def _closed(self, load: ClosedLoop, stop: asyncio.Event) -> list[Answer]:
        answers: list[Answer] = []
        until_s = time.monotonic() + load.seconds
        last = math.inf if load.requests is None else self._sent + load.requests

        async def keep_asking() -> None:
            while self._sent < last and time.monotonic() < until_s and not stop.is_set():
                answers.append(await self._ask())
                if answers[-1].retry_after_s:
                    await asyncio.sleep(answers[-1].retry_after_s)

        await asyncio.gather(*(keep_asking() for _ in range(load.concurrency)))
        return answers

    async def _open(self, load: OpenLoop, stop: asyncio.Event) -> list[Answer]:
        rng = np.random.default_rng(load.seed)
        asked: list[asyncio.Task[Answer]] = []
        due_s = time.monotonic()
        until_s = due_s + load.seconds
        while due_s < until_s and not stop.is_set():
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            asked.append(asyncio.create_task(self._ask()))
            due_s += rng.exponential(1 / load.per_s)
        answers = await asyncio.gather(*asked)
        return sorted(answers, key=lambda answer: answer.ended_s)

    async def _ask(self) -> Answer:
        body = self._bodies[self._sent % len(self._bodies)]
        self._sent += 1
        began_s = time.monotonic()
        try:
            async with self._session.post(self._target.url, data=body) as response:
                content = await response.read()
                ended_s = time.monotonic()
                answer = _noted(began_s, ended_s, response.status, content)
                retry_after_s = _retry_after_s(response.headers)
                return replace(answer, retry_after_s=retry_after_s) if retry_after_s else answer
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return Answer(began_s, time.monotonic(), NO_ANSWER, problem=type(error).__name__)


def _noted(began_s: float, ended_s: float, status: int, content: bytes) -> Answer:
    if status != OK:
        text = content[:_PROBLEM_LENGTH].decode(errors="replace")
        return Answer(began_s, ended_s, status, problem=f"{status}: {text}")
    answer = json.loads(content)
    version = answer["stages"].get("ranking", {}).get("model_version")
    is_degraded = bool(answer["degraded"])
    return Answer(began_s, ended_s, status, is_degraded, NO_VERSION if version is None else version)


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """What a refusal asks for, but never so long that a load would come to rest."""
    in_ms = headers.get("retry-after-ms")
    seconds = float(headers.get("retry-after", 0.0)) if in_ms is None else float(in_ms) / 1_000
    return min(seconds, _LONGEST_PAUSE_S)


@asynccontextmanager
async def http_load(target: Target) -> AsyncIterator[HttpLoad]:
    """A load generator whose connections stay open from one load to the next."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=REQUEST_TIMEOUT_S),
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
        headers={"Content-Type": "application/json"},
    ) as session:
        yield HttpLoad(target, session)
