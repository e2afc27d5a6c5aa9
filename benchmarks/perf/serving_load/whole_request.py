"""The whole request over HTTP against the compute of its three models, both idle and loaded."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.perf.figures import Figure, Measured, at_least, at_most, exactly
from benchmarks.perf.serving_load.answers import Answers
from benchmarks.perf.serving_load.client_process import LoadClient
from benchmarks.perf.serving_load.compute import ModelsAlone, ModelSeconds, compute_processes
from benchmarks.perf.serving_load.http_load import ClosedLoop
from benchmarks.perf.serving_load.processes import cpu_by_role, descendants
from benchmarks.perf.serving_load.service import RunningService
from benchmarks.perf.serving_load.world import WorldSettings
from benchmarks.perf.timing import Seconds, ratio_of_medians, spread

_LEAST_SHOWN_MS = 0.1
_FIRST_S = 0.1


@dataclass(frozen=True)
class WholeRequestSettings:
    """Sizes of the measurement."""

    rounds: int = 8
    requests_per_round: int = 30
    concurrency: int = 16
    seconds_per_round: float = 12.0  # beside which filling and draining the queues is little
    loaded_rounds: int = 6


class BadAnswersError(RuntimeError):
    """The service did not answer as it must for its times to mean anything."""


def measure_latency(
    settings: WholeRequestSettings,
    world: WorldSettings,
    service: RunningService,
    client: LoadClient,
) -> Measured:
    """One request at a time, in turns with the models alone in this process, one thread each."""
    torch.set_num_threads(1)
    models = ModelsAlone(service.home, world, service.args)
    one_at_a_time = ClosedLoop(1, requests=settings.requests_per_round)
    whole_s, alone = [], []
    for turn in range(-1, settings.rounds):
        ran = [models.run(user) for user in _in_turn(models.users, settings.requests_per_round)]
        answers = whole_answers(client.run(one_at_a_time))
        if turn >= 0:
            alone.append(ran)
            whole_s.append(answers.latency_s)
    shortest = min(map(len, whole_s))
    whole: Seconds = np.array([latency_s[:shortest] for latency_s in whole_s])
    models_s: Seconds = np.array([[part.models for part in ran] for ran in alone])
    figures = (
        Figure(
            "request_over_compute",
            f"request over HTTP, n={world.ranking_history:,}, {world.found:,} -> {world.kept} -> "
            f"{world.shown} / its three models alone",
            ratio_of_medians(whole, models_s),
            at_most(1.5),
        ),
        Figure(
            "request_over_compute_and_search",
            "the same / models and index search alone",
            ratio_of_medians(whole, models_s + _seconds(alone, "search")),
        ),
    )
    medians = {
        "request_p50_ms": 1_000 * float(np.median(whole)),
        "request_p99_ms": 1_000 * float(np.quantile(whole, 0.99)),
        "models_p50_ms": 1_000 * float(np.median(models_s)),
    }
    for part in ("retrieval", "search", "cascading", "ranking"):
        medians[f"{part}_alone_p50_ms"] = 1_000 * float(np.median(_seconds(alone, part)))
    return Measured(figures, medians)


def measure_throughput(
    settings: WholeRequestSettings,
    world: WorldSettings,
    service: RunningService,
    client: LoadClient,
) -> Measured:
    """Many requests at a time, in turns with one process per core that runs the models alone.

    Only whole answers count. CPU time, unlike time, is the same on a machine that is shared.
    """
    load = ClosedLoop(settings.concurrency, seconds=settings.seconds_per_round)
    cores = os.cpu_count() or 1
    served, allowed, latency_ms, model_cpu_s = [], [], [], []
    num_asked, num_ok, num_degraded, cpu_s = 0, 0, 0, Counter[str]()
    with compute_processes(service.home, world, service.args, cores) as alone:
        client.run(load)  # not counted: processes that have just started
        alone.rate(_FIRST_S)
        for _ in range(settings.loaded_rounds):
            before = descendants(os.getpid())
            answers = client.run(load)
            cpu_s.update(cpu_by_role(before, descendants(os.getpid())))
            served.append(rate_of(answers.select(answers.is_ok & ~answers.is_degraded)))
            latency_ms.append(answers.latency_ms(0.5, answers.is_ok))
            num_asked += len(answers)
            num_ok += int(answers.is_ok.sum())
            num_degraded += int(answers.is_degraded.sum())
            models = alone.rate(settings.seconds_per_round)
            allowed.append(models.requests_per_s)
            model_cpu_s.append(models.cpu_s_per_request)
    by_round = np.array(served) / np.array(allowed)
    cpu_ms = {role: 1_000 * taken / max(1, num_ok) for role, taken in cpu_s.most_common()}
    figures = (
        Figure(
            "throughput_over_compute",
            f"whole answers/s at concurrency {settings.concurrency} / requests/s of {cores} "
            "processes that run the three models alone",
            spread(float(np.median(served) / np.median(allowed)), by_round),
            at_least(0.8),
        ),
        Figure(
            "compute_share_of_cpu",
            "CPU time of the three models alone / CPU time of all processes, client too, an answer",
            exactly(1_000 * float(np.median(model_cpu_s)) / sum(cpu_ms.values())),
        ),
    )
    medians = {
        "requests_per_s": float(np.median(served)),
        "requests_per_s_models_allow": float(np.median(allowed)),
        "loaded_request_p50_ms": float(np.median(latency_ms)),
        "loaded_degraded_share": num_degraded / max(1, num_ok),
        "loaded_refused_share": 1 - num_ok / num_asked,
        "models_cpu_ms": 1_000 * float(np.median(model_cpu_s)),
        "cpu_ms_per_request": sum(cpu_ms.values()),
    }
    shown = {f"cpu_ms_{role}": taken for role, taken in cpu_ms.items() if taken >= _LEAST_SHOWN_MS}
    return Measured(figures, medians | shown)


def whole_answers(answers: Answers) -> Answers:
    """Those that every stage took part in; what a degraded one took means nothing.

    Raises:
        BadAnswersError: less than half are, so that the rest means nothing either.
    """
    is_whole = answers.is_ok & ~answers.is_degraded
    if 2 * int(is_whole.sum()) <= len(answers):
        raise BadAnswersError(
            f"{int((~is_whole).sum())} of {len(answers)} requests failed or were degraded under a "
            f"load that the service should carry: {list(answers.problems[:3])}"
        )
    return answers.select(is_whole)


def rate_of(answers: Answers) -> float:
    """Answers per second of a closed loop."""
    if not len(answers):
        return 0.0
    elapsed_s = float(answers.ended_s.max() - answers.began_s.min())
    return int(answers.is_ok.sum()) / elapsed_s


def _in_turn(users: list[int], count: int) -> list[int]:
    return [users[index % len(users)] for index in range(count)]


def _seconds(alone: list[list[ModelSeconds]], part: str) -> Seconds:
    return np.array([[getattr(ran, part) for ran in turn] for turn in alone])
