"""Asks shadow arms what another arm has answered, after the answer has gone out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from app.experiments.args import ShadowLimitArgs
from app.experiments.assignment import Assignment
from app.exposures import ExposureSink, shadow_exposure
from stages.graph import GraphResult
from stages.request import StageName, StageRequest, StageResult
from stages.variant import StageCall

logger = logging.getLogger("ray.serve")

ShadowOutcome = Literal["ok", "no_model", "late", "failed", "dropped"]

OnShadow = Callable[[StageName, str, ShadowOutcome], None]
"""Told what became of each run, by stage and arm."""


def nobody_counts(stage: StageName, arm: str, outcome: ShadowOutcome) -> None:
    """An `OnShadow` that does nothing."""


@dataclass(frozen=True)
class ShadowRun:
    """One shadow arm to be asked what its stage was asked."""

    stage: StageName
    arm: str
    request: StageRequest
    assignment: Assignment


@dataclass(frozen=True)
class ShadowCounts:
    """Shadow runs so far: done (answered or not), and dropped for want of room."""

    done: int
    dropped: int


class ShadowCaller:
    """Runs shadow arms on the event loop of the caller, a few at once; what comes while the queue
    is full is dropped and counted, so shadows can't pile up behind a slow arm."""

    def __init__(
        self,
        calls: Mapping[StageName, Mapping[str, StageCall]],
        timeouts_ms: Mapping[StageName, int],
        sink: ExposureSink,
        limits: ShadowLimitArgs,
        on_shadow: OnShadow = nobody_counts,
    ) -> None:
        """``timeouts_ms`` is how long a run may take, by stage, counted from its start."""
        self._calls = calls
        self._timeouts_ms = timeouts_ms
        self._sink = sink
        self._limits = limits
        self._on_shadow = on_shadow
        self._waiting: deque[ShadowRun] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._done = self._dropped = 0

    @property
    def counts(self) -> ShadowCounts:
        """Runs so far."""
        return ShadowCounts(self._done, self._dropped)

    def __call__(
        self, request: StageRequest, assignment: Assignment, result: GraphResult, latency_ms: float
    ) -> None:
        """Take the shadow runs of one answer; returns at once."""
        for stage, arms in assignment.shadows.items():
            asked = result.asked.get(stage)
            if asked is None:  # the stage was not reached, so there is nothing to compare with
                continue
            for arm in arms:
                self._offer(ShadowRun(stage, arm, asked, assignment))

    async def drain(self) -> None:
        """Wait until nothing runs or waits."""
        while self._running:
            await asyncio.wait(self._running)

    def _offer(self, run: ShadowRun) -> None:
        if len(self._running) < self._limits.max_running:
            self._start(run)
        elif len(self._waiting) < self._limits.max_waiting:
            self._waiting.append(run)
        else:
            self._dropped += 1
            self._on_shadow(run.stage, run.arm, "dropped")
            if self._dropped.bit_count() == 1:  # 1, 2, 4, 8, ...
                logger.warning(
                    "%d shadow runs were dropped so far, the last of %s/%s: more come than "
                    "routing.shadow_limits lets run",
                    self._dropped,
                    run.stage,
                    run.arm,
                )

    def _start(self, run: ShadowRun) -> None:
        task = asyncio.get_running_loop().create_task(self._run(run))
        self._running.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if task.cancelled():  # the event loop is closing
            return
        self._done += 1
        error = task.exception()
        if error is not None:
            logger.error("a shadow run was lost: %s: %s", type(error).__name__, error)
        if self._waiting:
            self._start(self._waiting.popleft())

    async def _run(self, run: ShadowRun) -> None:
        started_s = time.perf_counter()
        result, outcome = await self._answer(run)
        elapsed_ms = (time.perf_counter() - started_s) * 1000
        self._on_shadow(run.stage, run.arm, outcome)
        self._sink.record(shadow_exposure(run.request, run.assignment, result, elapsed_ms))

    async def _answer(self, run: ShadowRun) -> tuple[StageResult, ShadowOutcome]:
        timeout_ms = self._timeouts_ms[run.stage]
        deadline_ms = int(time.time() * 1000) + timeout_ms
        nothing = StageResult(run.stage, run.arm, num_in=len(run.request.candidates))
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                call = self._calls[run.stage][run.arm]
                result = await call(replace(run.request, deadline_ms=deadline_ms))
        except TimeoutError:
            return replace(nothing, reason=f"no answer within {timeout_ms} ms"), "late"
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return replace(nothing, reason="the call was cancelled where it ran"), "failed"
        except Exception as error:
            # Nobody waits for a shadow: that it failed is what its row says.
            return replace(nothing, reason=f"failed ({type(error).__name__})"), "failed"
        return result, result.outcome
