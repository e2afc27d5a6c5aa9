"""More requests than the service can answer: who is answered in time, and how the rest is told."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.perf.figures import Figure, Measured, at_least, at_most, exactly
from benchmarks.perf.serving_load.answers import Answers
from benchmarks.perf.serving_load.client_process import LoadClient
from benchmarks.perf.serving_load.http_load import ClosedLoop, OpenLoop
from benchmarks.perf.serving_load.processes import service_processes
from benchmarks.perf.serving_load.service import RunningService
from benchmarks.perf.serving_load.whole_request import rate_of


@dataclass(frozen=True)
class OverloadSettings:
    """Sizes of the measurement."""

    seconds: float = 60.0  # `--overload-s`
    times_capacity: float = 2.0
    concurrency: int = 16
    peak_seconds: float = 10.0


def measure_overload(
    settings: OverloadSettings, service: RunningService, client: LoadClient
) -> Measured:
    """First the capacity, then ``times_capacity`` as much, at random moments."""
    peak_load = ClosedLoop(settings.concurrency, seconds=settings.peak_seconds)
    client.run(peak_load)  # not counted: the service's own estimates have to settle
    peak_per_s = rate_of(client.run(peak_load))
    before_bytes = held_bytes(client)
    load = OpenLoop(settings.times_capacity * peak_per_s, settings.seconds)
    answers = client.run(load)
    grown = held_bytes(client) / before_bytes
    return describe(answers, peak_per_s, service.args.limits.deadline_ms, settings.seconds, grown)


def held_bytes(client: LoadClient) -> int:
    """What all processes of the service hold in memory of their own."""
    return sum(process.private_bytes for process in service_processes(client.pid))


def describe(
    answers: Answers, peak_per_s: float, deadline_ms: float, seconds: float, grown: float
) -> Measured:
    """The figures of an overload that lasted ``seconds``."""
    began_s = float(answers.began_s.min())
    answered_per_s = answers.ok_per_s(began_s, began_s + seconds)
    latest_ms = answers.latency_ms(1.0, answers.is_ok)
    refusal_p99_ms = answers.latency_ms(0.99, answers.is_refused)
    figures = (
        Figure(
            "overload.latest_over_deadline",
            "the latest answer / the deadline",
            exactly(latest_ms / deadline_ms),
            at_most(1.2),
        ),
        Figure(
            "overload.refusal_p99_over_deadline",
            "p99 of the time to a refusal / the deadline",
            exactly(refusal_p99_ms / deadline_ms),
            at_most(0.1),
        ),
        Figure(
            "overload.throughput_over_peak",
            "answers/s / answers/s of the closed loop before",
            exactly(answered_per_s / peak_per_s),
            at_least(0.8),
        ),
        Figure(
            "overload.memory_after_over_before",
            "memory of all processes of the service after / before",
            exactly(grown),
            at_most(1.05),
        ),
        Figure(
            "overload.failed",
            "requests that were neither answered nor refused",
            exactly(float(answers.is_failed.sum())),
            at_most(0),
        ),
    )
    num_ok = max(1, int(answers.is_ok.sum()))
    medians = {
        "overload.peak_per_s": peak_per_s,
        "overload.asked_per_s": len(answers) / seconds,
        "overload.answered_per_s": answered_per_s,
        "overload.degraded_share": float((answers.is_ok & answers.is_degraded).sum()) / num_ok,
        "overload.refused_share": float(answers.is_refused.mean()),
        "overload.answer_p50_ms": answers.latency_ms(0.5, answers.is_ok),
        "overload.answer_p99_ms": answers.latency_ms(0.99, answers.is_ok),
        "overload.answer_max_ms": latest_ms,
        "overload.refusal_p50_ms": answers.latency_ms(0.5, answers.is_refused),
        "overload.refusal_p99_ms": refusal_p99_ms,
    }
    return Measured(figures, medians)
