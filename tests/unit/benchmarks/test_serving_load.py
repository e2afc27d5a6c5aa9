"""The parts of the serving benchmark that need no service: what it makes of what it saw."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from benchmarks.perf import serving
from benchmarks.perf.figures import Measured
from benchmarks.perf.serving_load import faults, overload, swap
from benchmarks.perf.serving_load.answers import NO_ANSWER, Answer, Answers
from benchmarks.perf.serving_load.faults import Fault, lost_beyond
from benchmarks.perf.serving_load.http_load import ClosedLoop, Load, OpenLoop, Target, http_load
from benchmarks.perf.serving_load.options import parse_options
from benchmarks.perf.serving_load.processes import Process, cpu_by_role, descendants, kill
from benchmarks.perf.serving_load.result import nested
from benchmarks.perf.serving_load.swap import Swap
from benchmarks.perf.serving_load.whole_request import BadAnswersError, rate_of, whole_answers
from benchmarks.perf.serving_load.world import WorldSettings, newest_rows
from stages.request import STAGES


def values(measured: Measured) -> dict[str, float]:
    return {figure.key: figure.ratio.value for figure in measured.figures} | measured.medians


def test_answers_are_ok_refused_or_failed() -> None:
    answers = Answers.of(
        [
            Answer(0.0, 0.5, 200, version=3),
            Answer(0.0, 0.1, 429),
            Answer(0.2, 0.3, 503),
            Answer(0.4, 1.0, 500, problem="500: lost"),
            Answer(0.5, 2.0, NO_ANSWER, problem="ClientOSError"),
        ]
    )
    assert answers.is_ok.tolist() == [True, False, False, False, False]
    assert answers.is_refused.tolist() == [False, True, True, False, False]
    assert answers.is_failed.tolist() == [False, False, False, True, True]
    assert answers.problems == ("500: lost", "ClientOSError")
    assert answers.latency_ms(1.0) == pytest.approx(1500)
    assert answers.latency_ms(0.5, answers.is_ok) == pytest.approx(500)
    assert answers.latency_ms(0.5, np.zeros(5, np.bool_)) == 0
    assert len(answers.begun_in(0.2, 0.5)) == 2
    assert answers.ok_per_s(0.0, 2.0) == 0.5
    assert rate_of(answers) == 0.5
    assert rate_of(Answers.of([])) == 0


def test_times_of_degraded_answers_do_not_count() -> None:
    answers = [Answer(0.0, 1.0, 200), Answer(0.0, 2.0, 200), Answer(0.0, 9.0, 200, True)]
    assert whole_answers(Answers.of(answers)).latency_s.tolist() == [1.0, 2.0]
    with pytest.raises(BadAnswersError, match="2 of 4 requests failed or were degraded"):
        whole_answers(Answers.of([*answers, Answer(0.0, 1.0, 500)]))


def test_an_overload_is_described_by_its_latest_answer_and_its_refusals() -> None:
    came = [Answer(t, t + 0.5, 200, is_degraded=t < 1) for t in np.arange(0, 9, 0.5)]
    came += [Answer(t, t + 0.01, 429) for t in np.arange(0, 9, 0.25)]
    found = values(overload.describe(Answers.of(came), 2.0, 400, 9.0, 1.01))
    assert found["overload.latest_over_deadline"] == pytest.approx(1.25)
    assert found["overload.refusal_p99_over_deadline"] == pytest.approx(0.025)
    assert found["overload.throughput_over_peak"] == pytest.approx(17 / 9 / 2)
    assert found["overload.failed"] == 0
    assert found["overload.degraded_share"] == pytest.approx(2 / 18)
    assert found["overload.refused_share"] == pytest.approx(2 / 3)


def test_only_what_was_under_way_on_a_killed_replica_may_be_lost() -> None:
    answers = Answers.of(
        [
            Answer(9.0, 10.5, 500),  # under way when the replica was killed
            Answer(10.1, 10.6, 500),  # sent after it
            Answer(19.0, 20.5, 500),  # under way when Redis was killed, which answers no request
            Answer(20.0, 20.5, 200, is_degraded=True),
        ]
    )
    killed = [Fault("replica", 10.0, 12.0, loses_requests=True), Fault("redis", 20.0, 21.0)]
    assert lost_beyond(answers, killed).tolist() == [False, True, True, False]
    found = values(faults.describe(answers, killed))
    assert found["faults.failed"] == 2
    assert found["faults.replica_failed"] == 2
    assert found["faults.redis_degraded"] == 1
    assert found["faults.redis_whole_again_s"] == 1


def test_a_swap_is_compared_with_the_time_before_it() -> None:
    before = [Answer(t, t + 0.1, 200, version=1) for t in np.arange(0, 10, 0.5)]
    during = [Answer(t, t + 0.15, 200, version=1 + (t > 12)) for t in np.arange(10, 20, 0.5)]
    found = values(swap.describe(Answers.of(before + during), [Swap(0.0, 10.0, 20.0)]))
    assert found["swap.p99_during_over_before"] == pytest.approx(1.5)
    assert found["swap.versions_seen"] == 2
    assert found["swap.failed"] == 0


def test_figures_of_one_kind_are_kept_together() -> None:
    line = json.dumps({"overload.failed": 0, "rank_over_naive_1000": 0.1, "plain": 2})
    assert json.loads(nested(line)) == {
        "overload": {"failed": 0},
        "rank_over_naive": {"1000": 0.1},
        "plain": 2,
    }


def test_cpu_time_is_counted_by_role_with_processes_that_are_new() -> None:
    def process(pid: int, title: str, cpu_s: float) -> Process:
        return Process(pid, 1, title, 0, cpu_s)

    ranking = "ray::ServeReplica:app:ranking-default.run"
    before = [process(5, ranking, 1.0), process(6, "/usr/bin/redis-server 1", 2.0)]
    after = [
        process(5, ranking, 1.5),
        process(7, ranking, 2.0),
        process(6, "/usr/bin/redis-server 1", 2.25),
        process(8, "ray::MemoryShard.lookup", 0.1),
    ]
    assert cpu_by_role(before, after) == pytest.approx(
        {"ranking-default": 2.5, "redis-server": 0.25, "MemoryShard": 0.1}
    )


def test_only_processes_of_the_benchmark_can_be_killed() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert child.pid in {process.pid for process in descendants(os.getpid())}
        kill(child.pid)
        assert child.wait(30) != 0
    finally:
        child.communicate()
    with pytest.raises(ValueError, match="none that this benchmark started"):
        kill(os.getppid())


def test_an_environment_replaces_what_was_set_of_serve() -> None:
    variables = {"RAY_SERVE_A": "1", "RAY_B": "x"}
    ours = {"PATH": "p", "RAY_SERVE_OLD": "1", "RAY_event_stats": "0"}  # of fast.env
    env = serving.session_env(ours, variables)
    assert env == {"PATH": "p", "RAY_USAGE_STATS_ENABLED": "0", **variables}


def test_all_parts_are_measured_unless_some_are_chosen() -> None:
    assert parse_options("what", []).parts[0] == "compute"
    assert parse_options("what", ["--parts", "swap", "--env", "fast"]).parts == ["swap"]
    with pytest.raises(SystemExit):
        parse_options("what", ["--parts", "magic"])


def test_the_rows_of_a_user_can_be_made_again() -> None:
    world = WorldSettings(num_users=2, ranking_history=8)
    user = int(world.users()[1])
    rows = newest_rows(world, user, 3)
    assert rows.offsets.tolist() == [0, 3]
    assert np.array_equal(rows.rows, newest_rows(world, user, 8).rows[-3:])
    assert [world.model_config(stage).history_length for stage in STAGES] == [200, 100, 8]


class _Handler(BaseHTTPRequestHandler):
    """Answers every second request, and tells the others to come back."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        is_ok = next(self.server.turns)  # type: ignore[attr-defined]
        answer = {
            "stages": {"ranking": {"model_version": 7}},
            "degraded": ["late"] if asked["user_id"] == 2 else [],
        }
        content = json.dumps(answer if is_ok else {"error": "busy"}).encode()
        self.send_response(200 if is_ok else 429)
        self.send_header("content-length", str(len(content)))
        if not is_ok:
            self.send_header("retry-after", "1")
            self.send_header("retry-after-ms", "2")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.turns = iter([True, False] * 100)  # type: ignore[attr-defined]
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/recommend"
        server.shutdown()
        thread.join()


def run(url: str, load: Load) -> Answers:
    async def ask() -> list[Answer]:
        async with http_load(Target(url, (1, 2), shown=3)) as client:
            return await client.run(load, asyncio.Event())

    return Answers.of(asyncio.run(ask()))


def test_a_closed_loop_sends_as_many_as_it_is_told(url: str) -> None:
    answers = run(url, ClosedLoop(1, requests=8))
    assert answers.status.tolist() == [200, 429] * 4
    assert set(answers.version[answers.is_ok].tolist()) == {7}
    assert (answers.latency_s > 0).all()
    assert (np.diff(answers.began_s) > 0).all()


def test_an_open_loop_sends_at_its_own_times(url: str) -> None:
    answers = run(url, OpenLoop(per_s=200, seconds=0.2, seed=3))
    assert len(answers) > 0
    assert not answers.is_failed.any()
    assert answers.is_degraded.sum() <= answers.is_ok.sum()


def test_a_dead_service_is_a_failed_request() -> None:
    answers = run("http://127.0.0.1:9/recommend", ClosedLoop(1, requests=2))
    assert answers.status.tolist() == [NO_ANSWER] * 2
    assert answers.is_failed.all()
    assert len(answers.problems) == 1
