"""`app.admission` in front of a simulated machine, on simulated time."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import pytest

from app.admission import Admission, AdmissionPolicy, Ticket
from app.errors import OverloadedError

WORK_MS = 20.0
NUM_CPUS = 2
DEADLINE_MS = 1000.0
CAPACITY_PER_S = NUM_CPUS * 1000 / WORK_MS


@dataclass
class Running:
    door: AbstractContextManager[Ticket]
    ticket: Ticket
    began_ms: float
    left_ms: float = WORK_MS


class Machine:
    """``NUM_CPUS`` shared fairly by the requests in work, one CPU for each at most."""

    def __init__(self, admission: Admission, now_ms: list[float]) -> None:
        self._admission = admission
        self._now_ms = now_ms
        self._running: list[Running] = []
        self.latencies_ms: list[float] = []
        self.num_refused = 0

    def arrive(self) -> None:
        door = self._admission.admitted(DEADLINE_MS)
        try:
            self._running.append(Running(door, door.__enter__(), self._now_ms[0]))
        except OverloadedError:
            self.num_refused += 1

    def pass_until(self, time_ms: float) -> None:
        while self._running:
            speed = min(1.0, NUM_CPUS / len(self._running))
            first = min(self._running, key=lambda running: running.left_ms)
            step_ms = min(first.left_ms / speed, time_ms - self._now_ms[0])
            self._now_ms[0] += step_ms
            for running in self._running:
                running.left_ms -= step_ms * speed
            if first.left_ms > 1e-9:
                break
            self._running.remove(first)
            first.ticket.is_lesson = True
            first.door.__exit__(None, None, None)
            self.latencies_ms.append(self._now_ms[0] - first.began_ms)
        self._now_ms[0] = time_ms


def run(times_capacity: float, seconds: float, policy: AdmissionPolicy) -> tuple[Machine, float]:
    """The machine after random arrivals, and its answers per second."""
    now_ms = [0.0]
    machine = Machine(Admission(policy, lambda: now_ms[0] / 1000), now_ms)
    gaps_ms = np.random.default_rng(7).exponential(
        1000 / (times_capacity * CAPACITY_PER_S), int(times_capacity * CAPACITY_PER_S * seconds)
    )
    for time_ms in np.cumsum(gaps_ms).tolist():
        machine.pass_until(time_ms)
        machine.arrive()
    return machine, len(machine.latencies_ms) / (now_ms[0] / 1000)


@pytest.mark.parametrize("times_capacity", [2.0, 5.0])
def test_overload_is_answered_in_time_at_full_throughput(times_capacity):
    machine, answers_per_s = run(times_capacity, 30, AdmissionPolicy(64, 4, 0.4))
    assert max(machine.latencies_ms) < DEADLINE_MS
    assert np.median(machine.latencies_ms) < 0.5 * DEADLINE_MS
    assert answers_per_s > 0.95 * CAPACITY_PER_S
    assert machine.num_refused > 0


def test_what_the_machine_can_do_is_not_refused():
    machine, _ = run(0.7, 30, AdmissionPolicy(64, 4, 0.4))
    assert machine.num_refused == 0


def test_without_an_estimate_requests_would_wait_for_ever():
    machine, _ = run(2.0, 30, AdmissionPolicy(10_000, 10_000, 1.0))
    assert max(machine.latencies_ms) > 5 * DEADLINE_MS
