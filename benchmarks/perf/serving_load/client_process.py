"""The client of the service, in a process of its own, so that it takes no turn from any other."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

from benchmarks.perf.serving_load.answers import Answers
from benchmarks.perf.serving_load.http_load import Load, Target, http_load

_ANSWER_TIMEOUT_S = 900.0
_EXIT_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class _Stop:
    """End the load under way."""


class LoadClient:
    """Sends loads to the client process and takes what they got."""

    def __init__(self, connection: Connection, pid: int) -> None:
        self.pid = pid
        self._connection = connection

    def run(self, load: Load) -> Answers:
        """All answers of a load, once it is over."""
        self._connection.send(load)
        return self._answers()

    @contextmanager
    def running(self, load: Load) -> Iterator[list[Answers]]:
        """The load is under way meanwhile; its answers are in the list afterwards."""
        got: list[Answers] = []
        self._connection.send(load)
        try:
            yield got
        finally:
            self._connection.send(_Stop())
            got.append(self._answers())

    def _answers(self) -> Answers:
        if not self._connection.poll(_ANSWER_TIMEOUT_S):
            raise TimeoutError(f"the client gave no answers within {_ANSWER_TIMEOUT_S:.0f} s")
        answers = self._connection.recv()
        if not isinstance(answers, Answers):
            raise TypeError(f"expected the answers of a load, got {answers!r}")
        return answers


@contextmanager
def client_process(target: Target) -> Iterator[LoadClient]:
    """A client that ends with the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, target), name="client", daemon=True)
    process.start()
    theirs.close()
    try:
        yield LoadClient(ours, process.pid or 0)
    finally:
        ours.close()  # the client ends when its pipe does
        process.join(_EXIT_TIMEOUT_S)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(connection: Connection, target: Target) -> None:
    asyncio.run(_serve_loads(connection, target))


async def _serve_loads(connection: Connection, target: Target) -> None:
    loop = asyncio.get_running_loop()
    received: asyncio.Queue[tuple[Load, asyncio.Event] | None] = asyncio.Queue()
    stop_newest = asyncio.Event()

    def receive() -> None:
        nonlocal stop_newest
        try:
            command = connection.recv()
        except EOFError:  # nobody needs the client any more
            loop.remove_reader(connection.fileno())
            stop_newest.set()
            received.put_nowait(None)
            return
        if isinstance(command, _Stop):
            stop_newest.set()
        else:
            stop_newest = asyncio.Event()
            received.put_nowait((command, stop_newest))

    loop.add_reader(connection.fileno(), receive)
    async with http_load(target) as client:
        while (order := await received.get()) is not None:
            answers = await client.run(*order)
            connection.send(Answers.of(answers))
