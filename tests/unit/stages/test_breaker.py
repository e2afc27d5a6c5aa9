from __future__ import annotations

import pytest

from stages.breaker import BreakerPolicy, CircuitBreaker


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def breaker(clock):
    return CircuitBreaker(BreakerPolicy(failures=3, probe_every_s=1.0), clock)


def fail(breaker, times: int) -> None:
    for _ in range(times):
        breaker.failed()


def test_only_failures_in_a_row_open_it(breaker):
    fail(breaker, 2)
    breaker.succeeded()
    fail(breaker, 2)
    assert breaker.state == "closed"
    breaker.failed()
    assert breaker.state == "open"


def test_one_probe_at_a_time_and_only_when_it_is_due(breaker, clock):
    fail(breaker, 3)
    assert not breaker.probe_is_due()
    clock.now_s += 1.0
    assert breaker.probe_is_due()
    assert breaker.state == "half_open"
    assert not breaker.probe_is_due()


def test_a_probe_decides(breaker, clock):
    fail(breaker, 3)
    for _ in range(3):
        clock.now_s += 1.0
        assert breaker.probe_is_due()
        breaker.failed()
        assert breaker.state == "open"
        assert not breaker.probe_is_due()
    clock.now_s += 1.0
    assert breaker.probe_is_due()
    breaker.succeeded()
    assert breaker.state == "closed"
    fail(breaker, 2)
    assert breaker.state == "closed"


def test_a_probe_that_nobody_waited_for_is_made_again(breaker, clock):
    fail(breaker, 3)
    clock.now_s += 1.0
    assert breaker.probe_is_due()
    breaker.gave_up()
    assert breaker.state == "open"
    clock.now_s += 1.0
    assert breaker.probe_is_due()


def test_a_policy_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="failures of at least 1"):
        BreakerPolicy(failures=0)
    with pytest.raises(ValueError, match="above 0"):
        BreakerPolicy(probe_every_s=0.0)
