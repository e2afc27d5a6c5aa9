"""Requests that come while a variant is busy travel together, in one call.

A call costs both its ends milliseconds, whatever it carries: event loops, messages, wake-ups of a
process whose caches others have filled since. So a few calls of a variant are under way at a time;
what comes meanwhile waits here, where cancelling it is free, and shares the next call. While calls
are free nothing waits.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from stages.request import StageRequest, StageResult
from stages.variant import QueueFullError

REQUESTS_PER_CALL = 8
"""More save little, and the first of them waits for the last."""

CANDIDATES_PER_CALL = 8_192
"""Of all requests of a call: what takes long by itself shares with few. It also keeps messages far
below the 4 MiB that gRPC takes."""

REPLY_MS = 50.0
"""A shared call is answered so long before the first of its requests is late."""

Reply = Sequence[StageResult | None]
"""Results in the order of the requests of a call; None for one that is to be asked again."""

SendGroup = Callable[[tuple[StageRequest, ...]], Awaitable[Reply]]
"""One call of a variant. Cancelling it has to cancel what it started."""


class CallCancelledError(RuntimeError):
    """A call was cancelled where it ran, though its requests are waited for."""


async def answer_together(
    answer: Callable[[StageRequest], Awaitable[StageResult]], requests: tuple[StageRequest, ...]
) -> list[StageResult | None]:
    """What a replica makes of a call: the result of each request.

    Requests that share a call must not make each other late: the reply leaves before the first of
    those that can still be answered in time is late, with None for what is not computed by then.
    """
    if len(requests) == 1:
        return [await answer(requests[0])]
    tasks = [asyncio.ensure_future(answer(request)) for request in requests]
    now_ms = time.time() * 1000
    left_ms = [each.deadline_ms - now_ms - REPLY_MS for each in requests]
    left_s = min((left for left in left_ms if left > 0), default=None)
    if left_s is not None:
        left_s /= 1000
    try:
        await asyncio.wait(tasks, timeout=left_s)
    finally:
        for task in tasks:
            task.cancel()  # nothing, where it is done
    return [task.result() if task.done() else None for task in tasks]


@dataclass(frozen=True)
class GroupLimits:
    """How requests travel.

    Attributes:
        calls: at most this many calls are under way at a time.
        waiting: at most this many requests wait for one.
        requests: at most this many requests share a call.
        candidates: at most this many candidates, of all its requests, unless one has more alone.
    """

    calls: int
    waiting: int = 256
    requests: int = REQUESTS_PER_CALL
    candidates: int = CANDIDATES_PER_CALL

    def __post_init__(self) -> None:
        if min(self.calls, self.requests, self.candidates) < 1 or self.waiting < 0:
            raise ValueError(
                "calls, requests and candidates must be at least 1 and waiting at least 0, got "
                f"{self}"
            )


@dataclass(eq=False)
class _Member:
    request: StageRequest
    answer: asyncio.Future[StageResult]
    call: _Call | None = None  # the call that it travels with
    travels_alone: bool = False

    @property
    def num_candidates(self) -> int:
        """Candidates that it brings, or those that it wants back."""
        return max(len(self.request.candidates), self.request.limit)


@dataclass(eq=False)
class _Call:
    members: list[_Member]
    task: asyncio.Task[None] | None = field(default=None)


class GroupedCalls:
    """A `StageCall` whose requests share calls. Belongs to one event loop."""

    def __init__(self, send: SendGroup, limits: GroupLimits) -> None:
        self._send = send
        self._limits = limits
        self._waiting: deque[_Member] = deque()
        self._under_way: set[_Call] = set()
        self._starts_soon = False

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a call."""
        return len(self._waiting)

    async def __call__(self, request: StageRequest) -> StageResult:
        """The answer to one request.

        Cancelling it takes it out of those that wait. One that travels with others is dropped when
        they are, too; the replica does not start what is past its deadline. One that a shared call
        had no time for travels once more, alone.

        Raises:
            QueueFullError: as many wait as may.
            CallCancelledError: the call was cancelled, but not from here.
            Exception: whatever the call raised, one error for all that it carried.
        """
        member = _Member(request, asyncio.get_running_loop().create_future())
        if len(self._waiting) - self._num_free() >= self._limits.waiting:
            raise QueueFullError(
                f"{self._limits.waiting} requests wait already for the {self._limits.calls} calls "
                "that may be under way"
            )
        self._waiting.append(member)
        self._start_soon()
        try:
            return await member.answer
        except asyncio.CancelledError:
            member.answer.cancel()
            self._left(member)
            raise

    def _left(self, member: _Member) -> None:
        """Nobody waits for this one any more."""
        call = member.call
        if call is None:
            with suppress(ValueError):
                self._waiting.remove(member)
        elif call.task is not None and all(each.answer.cancelled() for each in call.members):
            call.task.cancel()

    def _num_free(self) -> int:
        return self._limits.calls - len(self._under_way)

    def _start_soon(self) -> None:
        """Start calls when all that came with this request are here: those that shared a call in
        the stage before come in one turn of the event loop."""
        if not self._starts_soon and self._num_free():
            self._starts_soon = True
            asyncio.get_running_loop().call_soon(self._start_calls)

    def _start_calls(self) -> None:
        self._starts_soon = False
        self._waiting = deque(each for each in self._waiting if not each.answer.done())
        # No call takes what another could start with.
        share = min(self._limits.requests, -(-len(self._waiting) // self._limits.calls))
        while self._waiting and self._num_free():
            call = _Call(self._next_group(share))
            for member in call.members:
                member.call = call
            self._under_way.add(call)
            # A call belongs to none of the requests it carries: where a client goes, Serve cancels
            # whatever was called in the context of its request.
            call.task = asyncio.create_task(self._run(call), context=contextvars.Context())
            # Not by the task itself, which is never run when it is cancelled before it starts.
            call.task.add_done_callback(partial(self._ended, call))

    def _ended(self, call: _Call, task: asyncio.Task[None]) -> None:
        _fail(call, CallCancelledError("the call was cancelled before it began"))
        self._under_way.discard(call)
        self._start_soon()

    def _next_group(self, most: int) -> list[_Member]:
        """Those that have waited longest."""
        group = [self._waiting.popleft()]
        num_candidates = group[0].num_candidates
        while self._waiting and len(group) < most:
            if group[0].travels_alone or self._waiting[0].travels_alone:
                break
            num_candidates += self._waiting[0].num_candidates
            if num_candidates > self._limits.candidates:
                break
            group.append(self._waiting.popleft())
        return group

    async def _run(self, call: _Call) -> None:
        try:
            results = await self._send(tuple(member.request for member in call.members))
            if len(results) != len(call.members):
                raise ValueError(
                    f"a call of {len(call.members)} requests must have as many results, got "
                    f"{len(results)}; which is whose is not known"
                )
            for member, result in zip(call.members, results, strict=True):
                self._hand_over(member, result)
        except asyncio.CancelledError:  # by all its members, who are gone, or where it ran
            _fail(call, CallCancelledError("the call was cancelled where it ran"))
        except Exception as error:
            _fail(call, error)

    def _hand_over(self, member: _Member, result: StageResult | None) -> None:
        if member.answer.done():
            return
        if result is not None:
            member.answer.set_result(result)
            return
        if member.travels_alone:
            member.answer.set_exception(RuntimeError("a call of one request came back without it"))
            return
        member.call, member.travels_alone = None, True
        # So that the newest goes first: what has waited longer is more often past saving.
        self._waiting.appendleft(member)


def _fail(call: _Call, error: Exception) -> None:
    """Tell those that still travel with the call."""
    for member in call.members:
        if member.call is call and not member.answer.done():
            member.answer.set_exception(error)
