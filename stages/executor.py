"""The threads of a stage replica: what nobody waits for any more is never started."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
R = TypeVar("R")


class StageThreads:
    """Runs blocking calls off the event loop, at most ``num_threads`` at once.

    Cancelling the awaiting task takes a call that has not started out of the queue; one that runs
    is left to finish, for a thread can't be stopped. The queue is as long as the callers that wait,
    whom Serve bounds by ``max_ongoing_requests``.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(num_threads, name)

    async def run(self, call: Callable[[A], R], argument: A) -> R:
        """``call(argument)`` in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, argument)

    def shutdown(self) -> None:
        """Let what runs finish, and drop what waits."""
        self._pool.shutdown(wait=True, cancel_futures=True)
