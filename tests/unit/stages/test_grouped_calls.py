"""`stages.grouped_calls`: what travels together, what waits, and who hears of a lost call."""

import asyncio
import contextvars
import time
from dataclasses import replace

import pytest

from marm.items import ItemFeatures
from stages.grouped_calls import (
    REPLY_MS,
    CallCancelledError,
    GroupedCalls,
    GroupLimits,
    answer_together,
)
from stages.request import StageRequest, StageResult
from stages.variant import QueueFullError


class Replica:
    """Answers a call when it is told to, and keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.cancelled: list[list[str]] = []
        self._open: list[asyncio.Future[None]] = []

    async def send(self, requests: tuple[StageRequest, ...]) -> list[StageResult]:
        names = [request.request_id for request in requests]
        self.calls.append(names)
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._open.append(told)
        try:
            await told
        except asyncio.CancelledError:
            self.cancelled.append(names)
            raise
        return [StageResult("ranking", name) for name in names]

    async def finish(self, call: int, error: BaseException | None = None) -> None:
        if error is None:
            self._open[call].set_result(None)
        else:
            self._open[call].set_exception(error)
        await settled()


async def settled() -> None:
    """Let every task run until it waits for something that has not happened."""
    for _ in range(20):
        await asyncio.sleep(0)


def request(name: str, limit: int = 5) -> StageRequest:
    return StageRequest(name, 1, 1, None, 0, limit, 10**15, candidates=ItemFeatures.empty())


async def ask(calls: GroupedCalls, *names: str, limit: int = 5) -> list[asyncio.Task[StageResult]]:
    """Requests that come one after the other."""
    tasks = []
    for name in names:
        tasks.append(asyncio.create_task(calls(request(name, limit))))
        await settled()
    return tasks


def test_a_request_that_finds_room_travels_at_once_and_alone():
    async def run() -> None:
        replica = Replica()
        calls = GroupedCalls(replica.send, GroupLimits(2))
        asked = await ask(calls, "a", "b")
        assert replica.calls == [["a"], ["b"]]
        await replica.finish(1)
        await replica.finish(0)
        assert [task.result().variant for task in asked] == ["a", "b"]

    asyncio.run(run())


def test_what_comes_while_calls_are_under_way_shares_the_next_and_everyone_gets_its_own_answer():
    async def run() -> None:
        replica = Replica()
        calls = GroupedCalls(replica.send, GroupLimits(1, requests=3))
        asked = await ask(calls, "a", "b", "c", "d", "e")
        assert replica.calls == [["a"]]
        assert calls.num_waiting == 4
        await replica.finish(0)
        assert replica.calls == [["a"], ["b", "c", "d"]]
        await replica.finish(1)
        await replica.finish(2)
        assert replica.calls[2] == ["e"]
        assert [task.result().variant for task in asked] == ["a", "b", "c", "d", "e"]

    asyncio.run(run())


def test_a_call_takes_its_share_of_those_that_wait_and_leaves_the_rest_to_the_others():
    async def run() -> None:
        replica = Replica()
        calls = GroupedCalls(replica.send, GroupLimits(2))
        await ask(calls, "a", "b", *"cdefgh")
        await replica.finish(0)
        assert replica.calls[2] == ["c", "d", "e"]
        await replica.finish(1)
        assert replica.calls[3] == ["f", "g"]

    asyncio.run(run())


def test_those_that_come_at_once_are_shared_out_over_the_calls_that_are_free():
    async def run() -> None:
        replica = Replica()
        calls = GroupedCalls(replica.send, GroupLimits(2))
        for name in "abcde":
            asyncio.create_task(calls(request(name)))  # noqa: RUF006
        await settled()
        assert replica.calls == [["a", "b", "c"], ["d", "e"]]

    asyncio.run(run())


def test_candidates_of_a_call_are_bounded_but_one_request_always_travels():
    async def run() -> None:
        replica = Replica()
        calls = GroupedCalls(replica.send, GroupLimits(1, candidates=20))
        await ask(calls, "a", "b", "c", "d", limit=10)
        await ask(calls, "huge", limit=10_000)
        for done in range(4):
            await replica.finish(done)
        assert replica.calls == [["a"], ["b", "c"], ["d"], ["huge"]]

    asyncio.run(run())


def test_who_leaves_while_waiting_is_never_sent():
    async def run() -> None:
        replica = Replica()
        calls = GroupedCalls(replica.send, GroupLimits(1))
        _, b, _ = await ask(calls, "a", "b", "c")
        b.cancel()
        await settled()
        assert calls.num_waiting == 1
        await replica.finish(0)
        assert replica.calls == [["a"], ["c"]]

    asyncio.run(run())


def test_a_call_is_cancelled_when_all_have_left_it_and_not_before():
    async def run() -> None:
        replica = Replica()
        calls = GroupedCalls(replica.send, GroupLimits(1))
        first, b, c = await ask(calls, "a", "b", "c")
        await replica.finish(0)
        b.cancel()
        await settled()
        assert replica.cancelled == []
        c.cancel()
        await settled()
        assert replica.cancelled == [["b", "c"]]
        assert b.cancelled()
        assert c.cancelled()
        assert first.result().variant == "a"
        await ask(calls, "d")  # its place is free again
        assert replica.calls[-1] == ["d"]

    asyncio.run(run())


def test_the_answer_of_who_stays_comes_though_another_left():
    async def run() -> None:
        replica = Replica()
        calls = GroupedCalls(replica.send, GroupLimits(1))
        _, b, c = await ask(calls, "a", "b", "c")
        await replica.finish(0)
        b.cancel()
        await settled()
        await replica.finish(1)
        assert c.result().variant == "c"

    asyncio.run(run())


def test_a_lost_call_is_lost_for_all_that_it_carried_and_for_nobody_else():
    async def run() -> None:
        replica = Replica()
        calls = GroupedCalls(replica.send, GroupLimits(1, requests=2))
        _, b, c, d = await ask(calls, "a", "b", "c", "d")
        await replica.finish(0)
        lost = ConnectionError("the replica died")
        await replica.finish(1, lost)
        assert b.exception() is lost
        assert c.exception() is lost
        await replica.finish(2)
        assert d.result().variant == "d"

    asyncio.run(run())


def test_a_call_that_was_cancelled_where_it_ran_is_heard_as_that():
    async def run() -> None:
        replica = Replica()
        calls = GroupedCalls(replica.send, GroupLimits(1))
        (a,) = await ask(calls, "a")
        await replica.finish(0, asyncio.CancelledError())
        assert isinstance(a.exception(), CallCancelledError)

    asyncio.run(run())


@pytest.mark.parametrize("turns", range(8))
def test_who_leaves_in_the_moment_in_which_its_call_starts_takes_no_place_along(turns):
    async def run() -> None:
        replica = Replica()
        calls = GroupedCalls(replica.send, GroupLimits(1))
        _, b = await ask(calls, "a", "b")
        replica._open[0].set_result(None)
        for _ in range(turns):
            await asyncio.sleep(0)
        b.cancel()
        await settled()
        assert b.cancelled()
        await ask(calls, "c")
        assert replica.calls[-1] == ["c"]
        await replica.finish(-1)
        assert calls.num_waiting == 0

    asyncio.run(run())


def test_what_a_shared_call_had_no_time_for_travels_once_more_and_alone():
    asked = []

    async def send(requests: tuple[StageRequest, ...]) -> list[StageResult | None]:
        names = [each.request_id for each in requests]
        asked.append(names)
        await asyncio.sleep(0)
        return [StageResult("ranking", names[0]), *[None] * (len(names) - 1)]

    async def run() -> list[str]:
        calls = GroupedCalls(send, GroupLimits(1))
        answers = await asyncio.gather(*(calls(request(name)) for name in "abc"))
        return [answer.variant for answer in answers]

    assert asyncio.run(run()) == ["a", "b", "c"]
    assert asked == [["a", "b", "c"], ["c"], ["b"]]


def test_a_request_that_comes_back_twice_without_an_answer_has_failed():
    asked = []

    async def send(requests: tuple[StageRequest, ...]) -> list[StageResult | None]:
        asked.append(len(requests))
        return [None] * len(requests)

    with pytest.raises(RuntimeError, match="came back without it"):
        asyncio.run(GroupedCalls(send, GroupLimits(1))(request("a")))
    assert asked == [1, 1]


def test_who_travels_with_a_call_that_is_stopped_before_it_began_hears_of_it():
    async def run() -> None:
        calls = GroupedCalls(Replica().send, GroupLimits(1))
        waits = asyncio.create_task(calls(request("a")))
        while not calls._under_way:
            await asyncio.sleep(0)
        (call,) = calls._under_way
        call.task.cancel()
        with pytest.raises(CallCancelledError):
            await waits
        assert not calls._under_way

    asyncio.run(run())


class Stage:
    """Answers those that it was told to, and never the others."""

    def __init__(self, *answered: str) -> None:
        self._answered = answered
        self.dropped: list[str] = []

    async def answer(self, asked: StageRequest) -> StageResult:
        if asked.request_id not in self._answered:
            try:
                await asyncio.Event().wait()
            finally:
                self.dropped.append(asked.request_id)
        await settled()  # not at once
        return StageResult("ranking", asked.request_id)


def due(name: str, in_ms: float) -> StageRequest:
    return replace(request(name), deadline_ms=int(time.time() * 1000 + in_ms))


def test_a_reply_leaves_before_the_first_of_its_requests_is_late():
    stage = Stage("a", "c")

    async def run() -> list[StageResult | None]:
        requests = due("a", REPLY_MS + 1_000), due("b", 60_000), due("c", 60_000)
        results = await answer_together(stage.answer, requests)
        await settled()
        return results

    a, b, c = asyncio.run(run())
    assert (a.variant, b, c.variant) == ("a", None, "c")
    assert stage.dropped == ["b"]


@pytest.mark.parametrize("in_ms", [-1, REPLY_MS - 1])
def test_one_that_can_not_be_answered_in_time_holds_nobody_back(in_ms):
    stage = Stage("late", "b")
    requests = due("late", in_ms), due("b", 60_000)
    results = asyncio.run(answer_together(stage.answer, requests))
    assert [result.variant for result in results] == ["late", "b"]


def test_a_cancelled_call_drops_all_of_its_requests():
    stage = Stage()

    async def run() -> None:
        requests = due("a", 60_000), due("b", 60_000)
        call = asyncio.create_task(answer_together(stage.answer, requests))
        await settled()
        call.cancel()
        await settled()
        assert call.cancelled()

    asyncio.run(run())
    assert stage.dropped == ["a", "b"]


def test_a_replica_that_answers_too_few_is_an_error_and_nobody_waits_for_ever():
    async def answers_one(requests: tuple[StageRequest, ...]) -> list[StageResult]:
        return [StageResult("ranking", "only")]

    async def run() -> None:
        calls = GroupedCalls(answers_one, GroupLimits(1))
        answers = await asyncio.gather(
            calls(request("a")), calls(request("b")), return_exceptions=True
        )
        assert answers[0] is answers[1]
        assert isinstance(answers[0], ValueError)
        assert (await calls(request("c"))).variant == "only"

    asyncio.run(run())


def test_more_than_may_wait_are_refused_and_those_that_wait_are_not_disturbed():
    async def run() -> None:
        replica = Replica()
        calls = GroupedCalls(replica.send, GroupLimits(1, waiting=1))
        a, b, c = await ask(calls, "a", "b", "c")
        assert isinstance(c.exception(), QueueFullError)
        await replica.finish(0)
        await replica.finish(1)
        assert a.result().variant == "a"
        assert b.result().variant == "b"

    asyncio.run(run())


def test_with_no_room_to_wait_a_request_that_finds_a_call_free_still_travels():
    async def run() -> None:
        replica = Replica()
        a, b = await ask(GroupedCalls(replica.send, GroupLimits(1, waiting=0)), "a", "b")
        assert replica.calls == [["a"]]
        assert not a.done()
        assert isinstance(b.exception(), QueueFullError)

    asyncio.run(run())


def test_a_call_runs_in_no_request_s_context_so_that_none_of_them_can_take_it_along():
    whose = contextvars.ContextVar("whose", default="nobody's")
    seen = []

    async def send(requests: tuple[StageRequest, ...]) -> list[StageResult]:
        seen.append(whose.get())
        return [StageResult("ranking", "x") for _ in requests]

    async def run() -> None:
        whose.set("a request's")
        await GroupedCalls(send, GroupLimits(1))(request("a"))

    asyncio.run(run())
    assert seen == ["nobody's"]


@pytest.mark.parametrize(
    "wrong", [{"calls": 0}, {"calls": 1, "requests": 0}, {"calls": 1, "waiting": -1}]
)
def test_limits_that_let_nothing_through_are_refused(wrong):
    with pytest.raises(ValueError, match="must be at least 1 and waiting at least 0"):
        GroupLimits(**wrong)
