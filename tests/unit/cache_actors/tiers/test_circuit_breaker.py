"""The circuit breaker, with a clock of its own."""

from __future__ import annotations

from cache_actors.tiers.circuit_breaker import CircuitBreaker


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_pauses_double_up_to_the_longest() -> None:
    clock = Clock()
    breaker = CircuitBreaker(0.1, 1.0, clock)
    assert breaker.allow()
    assert breaker.is_closed
    assert breaker.wait_s() == 0
    pauses = []
    for _ in range(6):
        breaker.failed()
        assert not breaker.allow()
        assert not breaker.is_closed
        pauses.append(round(breaker.wait_s(), 6))
        clock.now_s += breaker.wait_s()
        assert breaker.allow()
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


def test_one_caller_tries_after_a_pause_and_success_closes_it() -> None:
    clock = Clock()
    breaker = CircuitBreaker(0.1, 1.0, clock)
    breaker.failed()
    clock.now_s += 0.2
    assert breaker.allow()
    assert not breaker.allow(), "a second caller waits for the first"
    breaker.succeeded()
    assert breaker.is_closed
    assert breaker.allow()
    assert breaker.allow()


def test_a_caller_that_never_comes_back_does_not_block_it() -> None:
    clock = Clock()
    breaker = CircuitBreaker(0.1, 1.0, clock)
    breaker.failed()
    clock.now_s += 0.2
    assert breaker.allow()
    clock.now_s += 0.2
    assert breaker.allow()
