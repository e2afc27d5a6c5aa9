from __future__ import annotations

from contextlib import ExitStack, suppress

import pytest

from app.admission import Admission, AdmissionPolicy
from app.errors import OverloadedError


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def make(clock, most: int = 64, least: int = 1, share: float = 1.0) -> Admission:
    return Admission(AdmissionPolicy(most, least, share), clock)


def serve(admission, clock, took_ms: float, cut_short: bool = False) -> None:
    with admission.admitted(1e9) as ticket:
        clock.now_s += took_ms / 1000
        ticket.is_lesson, ticket.was_cut_short = True, cut_short


def test_more_than_the_bound_are_refused_and_leaving_makes_room(clock):
    admission = make(clock, most=2)
    with ExitStack() as inside:
        inside.enter_context(admission.admitted(1000))
        inside.enter_context(admission.admitted(1000))
        with pytest.raises(OverloadedError, match="2 requests are in work already") as refused:
            inside.enter_context(admission.admitted(1000))
        assert refused.value.retry_after_ms >= 100
    assert admission.in_work == 0
    with admission.admitted(1000):
        assert admission.in_work == 1


def test_who_could_not_be_answered_in_time_is_refused(clock):
    admission = make(clock, share=0.5)
    serve(admission, clock, took_ms=100)
    assert admission.estimate_ms(4) == pytest.approx(400)
    with ExitStack() as inside:
        for _ in range(5):
            inside.enter_context(admission.admitted(1000))
        with pytest.raises(OverloadedError, match="would take about 600 ms, 500 is allowed"):
            inside.enter_context(admission.admitted(1000))
        inside.enter_context(admission.admitted(1200))  # it has the time


def test_some_are_taken_whatever_the_estimate(clock):
    admission = make(clock, least=2)
    serve(admission, clock, took_ms=60_000)
    with admission.admitted(10), admission.admitted(10), pytest.raises(OverloadedError):
        admission.admitted(10).__enter__()


def test_the_estimate_heals_when_requests_become_faster(clock):
    admission = make(clock)
    serve(admission, clock, took_ms=1000)
    for _ in range(60):
        serve(admission, clock, took_ms=10)
    assert admission.estimate_ms(1) < 15


def test_the_share_of_a_request_is_its_time_by_those_beside_it(clock):
    admission = make(clock)
    with ExitStack() as inside:
        tickets = [inside.enter_context(admission.admitted(1e9)) for _ in range(4)]
        clock.now_s += 0.4
        tickets[-1].is_lesson = True  # leaves first, with four in work
    assert admission.estimate_ms(1) == pytest.approx(100)


def test_of_those_that_came_later_half_count(clock):
    admission = make(clock)
    with ExitStack() as later, admission.admitted(1e9) as ticket:
        for _ in range(2):
            later.enter_context(admission.admitted(1e9))
        clock.now_s += 0.4
        ticket.is_lesson = True
    assert admission.estimate_ms(1) == pytest.approx(200)  # one, and half of the two


def test_those_that_were_there_first_count_in_full_though_nobody_came_after(clock):
    admission = make(clock)
    with ExitStack() as first_three, ExitStack() as fourth:
        for _ in range(3):
            first_three.enter_context(admission.admitted(1e9))
        ticket = fourth.enter_context(admission.admitted(1e9))
        first_three.close()
        clock.now_s += 0.4  # it is served last
        ticket.is_lesson = True
    assert admission.estimate_ms(1) == pytest.approx(100)


def test_an_answer_without_all_stages_lowers_the_estimate_slowly(clock):
    admission = make(clock)
    serve(admission, clock, took_ms=100)
    for _ in range(20):
        serve(admission, clock, took_ms=1, cut_short=True)
    assert admission.estimate_ms(1) > 80
    for _ in range(1000):  # the stage stays away, so this is what a request costs now
        serve(admission, clock, took_ms=1, cut_short=True)
    assert admission.estimate_ms(1) < 2
    serve(admission, clock, took_ms=1001, cut_short=True)
    assert admission.estimate_ms(1) > 100


def test_a_failed_request_teaches_nothing_and_leaves(clock):
    admission = make(clock)
    with suppress(KeyError), admission.admitted(1000):
        clock.now_s += 5
        raise KeyError
    assert (admission.in_work, admission.estimate_ms(1)) == (0, 0)
