"""Requests that compute one after the other."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving_models import wait_until

from stages.executor import StageThreads
from stages.turns import TurnMissedError, Turns


def in_ms(left_ms: float) -> float:
    return time.time() * 1000 + left_ms


MINUTE_MS = 60_000.0


@pytest.fixture
def threads():
    with ThreadPoolExecutor(16) as pool:
        yield pool


class Work:
    """Takes a turn, notes that it was computed, and holds the turn until it is let go."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.go_on = threading.Event()
        self.done: list[int] = []

    def run(self, number: int, left_ms: float = MINUTE_MS) -> None:
        with self.turns.turn(in_ms(left_ms)):
            self.done.append(number)
            assert self.go_on.wait(30)

    def queue_up(self, threads: ThreadPoolExecutor, numbers: range) -> list:
        """One computes, the others wait in the order of their numbers."""
        running = []
        for waiting, number in enumerate(numbers):
            running.append(threads.submit(self.run, number))
            wait_until(lambda: self.done == [numbers[0]])
            wait_until(lambda waiting=waiting: self.turns.num_waiting == waiting)
        return running


def test_turns_come_in_the_order_in_which_they_were_asked_for(threads):
    work = Work(Turns())
    running = work.queue_up(threads, range(8))
    assert work.done == [0]
    work.go_on.set()
    for each in running:
        each.result(30)
    assert work.done == list(range(8))


def test_never_two_at_once(threads):
    turns, inside, most = Turns(), [], []

    def compute(number: int) -> None:
        for _ in range(200):
            with turns.turn(in_ms(MINUTE_MS)):
                inside.append(number)
                most.append(len(inside))
                inside.remove(number)

    list(threads.map(compute, range(8)))
    assert (len(most), max(most)) == (1600, 1)


def test_who_is_late_is_not_computed_and_holds_nobody_up(threads):
    work = Work(Turns())
    running = work.queue_up(threads, range(2))
    with pytest.raises(TurnMissedError, match="its time was over"):
        work.run(7, left_ms=20.0)
    with pytest.raises(TurnMissedError):
        work.run(8, left_ms=-1.0)
    assert work.turns.num_waiting == 1
    work.go_on.set()
    for each in running:
        each.result(30)
    work.run(9)
    assert work.done == [0, 1, 9]


def test_who_was_late_is_not_computed_even_when_nobody_computes():
    with pytest.raises(TurnMissedError), Turns().turn(in_ms(-1)):
        pytest.fail("was computed")


def test_a_turn_that_failed_is_passed_on(threads):
    turns = Turns()
    with pytest.raises(ValueError, match="broken"), turns.turn(in_ms(MINUTE_MS)):
        raise ValueError("broken")
    with turns.turn(in_ms(MINUTE_MS)):
        assert turns.num_waiting == 0


def test_any_deadline_will_do_and_a_turn_is_never_lost(threads):
    work = Work(Turns())
    first = threads.submit(work.run, 0)
    wait_until(lambda: work.done == [0])
    patient = threads.submit(work.run, 1, 1e18)
    wait_until(lambda: work.turns.num_waiting == 1)
    work.go_on.set()
    first.result(30)
    patient.result(30)
    work.run(2)
    assert work.done == [0, 1, 2]


def test_who_was_cancelled_while_waiting_takes_no_turn():
    async def scenario() -> list[str]:
        turns, stage_threads = Turns(), StageThreads(3, "stage")
        go_on, done = threading.Event(), []

        def compute(name: str) -> None:
            with turns.turn(in_ms(MINUTE_MS)):
                done.append(name)
                assert go_on.wait(30)

        first = asyncio.create_task(stage_threads.run(compute, "first"))
        await asyncio.to_thread(wait_until, lambda: done == ["first"])
        goes = asyncio.create_task(stage_threads.run(compute, "goes"))
        await asyncio.to_thread(wait_until, lambda: turns.num_waiting == 1)
        stays = asyncio.create_task(stage_threads.run(compute, "stays"))
        await asyncio.to_thread(wait_until, lambda: turns.num_waiting == 2)
        goes.cancel()
        await asyncio.gather(goes, return_exceptions=True)
        go_on.set()
        await asyncio.gather(first, stays)
        await asyncio.to_thread(stage_threads.shutdown)
        return done

    assert asyncio.run(scenario()) == ["first", "stays"]
