from __future__ import annotations

import asyncio
import threading

import pytest

from stages.executor import StageThreads


def test_what_waits_is_dropped_when_it_is_cancelled():
    release, started = threading.Event(), threading.Event()
    ran: list[str] = []

    def block(name: str) -> str:
        ran.append(name)
        started.set()
        assert release.wait(10)
        return name

    async def run() -> str:
        threads = StageThreads(1, "test")
        first = asyncio.create_task(threads.run(block, "first"))
        await asyncio.to_thread(started.wait, 10)
        waiting = [asyncio.create_task(threads.run(block, f"late {i}")) for i in range(3)]
        await asyncio.sleep(0)  # they are in the queue
        for task in waiting:
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        release.set()
        answer = await first
        threads.shutdown()
        return answer

    assert asyncio.run(run()) == "first"
    assert ran == ["first"]
