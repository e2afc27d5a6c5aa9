"""A stage that is as slow as a test wants it to be."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from ray import serve

from stages.executor import StageThreads
from stages.request import StageRequest, StageResult


def slow_stage(directory: Path) -> serve.Application:
    """A stage with one thread that tells by files what it does, and goes on when "go" is there, or
    "go" with the name of the request."""

    class SlowStage:
        def __init__(self) -> None:
            self._threads = StageThreads(1, "slow")

        async def run(self, requests: tuple[StageRequest, ...]) -> list[StageResult]:
            return await asyncio.gather(*map(self._run, requests))

        async def _run(self, request: StageRequest) -> StageResult:
            (directory / f"came {request.request_id}").touch()
            try:
                return await self._threads.run(self._work, request)
            except asyncio.CancelledError:
                (directory / f"cancelled {request.request_id}").touch()
                raise

        def _work(self, request: StageRequest) -> StageResult:
            (directory / f"started {request.request_id}").touch()
            signs = directory / "go", directory / f"go {request.request_id}"
            while not any(sign.exists() for sign in signs):
                time.sleep(0.01)
            return StageResult("ranking", "slow")

    options = {"max_ongoing_requests": 2, "max_queued_requests": 1}
    return serve.deployment(name="slow", **options)(SlowStage).bind()
