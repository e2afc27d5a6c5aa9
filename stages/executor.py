"""The threads of a stage replica: what nobody waits for any more is never started."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
R = TypeVar("R")


_caller_left: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar(
    "caller_left", default=None
)


def nobody_waits() -> bool:
    """Whether the call that this thread runs was cancelled, so that it may end itself."""
    left = _caller_left.get()
    return left is not None and left.is_set()


class StageThreads:
    """Runs blocking calls off the event loop, at most ``num_threads`` at once.

    Cancelling the awaiting task takes a call that has not started out of the queue; one that runs
    learns of it from `nobody_waits`, for a thread can't be stopped. The queue is as long as callers
    let it be: Serve bounds their calls by ``max_ongoing_requests``, `stages.grouped_calls` the
    requests of a call.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(num_threads, name)

    async def run(self, call: Callable[[A], R], argument: A) -> R:
        """``call(argument)`` in a thread."""
        left, context = threading.Event(), contextvars.copy_context()
        context.run(_caller_left.set, left)
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._pool, context.run, call, argument)
        except asyncio.CancelledError:
            left.set()
            raise

    def shutdown(self) -> None:
        """Let what runs finish, and drop what waits."""
        self._pool.shutdown(wait=True, cancel_futures=True)
