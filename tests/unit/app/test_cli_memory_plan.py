"""`marm memory plan`: a table, then one line of JSON, and no cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from app.cli.main import cli_app
from app.cli.memory.plan import show_bytes

OPTIONS = "--users 30000000 --rows 1953 --depth 4 --dim 128 --node-gib 1024"
PAPER = OPTIONS.split()


def plan(*options: str) -> Result:
    return CliRunner().invoke(cli_app, ["memory", "plan", *options])


def answer(*options: str) -> dict:
    result = plan(*options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_the_paper_s_deployment() -> None:
    found = answer(*PAPER, "--qps", "1000", "--rows-read", "200", "--candidates", "500")
    assert found["vector_bytes"] == pytest.approx(60e12, rel=1e-3)
    assert found["redis_key_bytes"] / found["vector_bytes"] == pytest.approx(1.6, abs=0.01)
    assert found["shards"] == 256
    assert found["per_second"]["read_bytes"] == 1000 * 200 * 1080
    assert found["cost_per_month"] == {"local": None, "redis": None, "log": None}


def test_replicas_and_dtypes() -> None:
    one = answer(*PAPER)
    two = answer(*PAPER, "--replicas", "2")
    assert two["total_bytes"] == 2 * one["total_bytes"] == 2 * one["stored_bytes"]
    assert two["nodes"] >= 2 * one["nodes"] - 1
    small = answer(*PAPER, "--dtype", "int8")
    assert small["vector_bytes"] == one["vector_bytes"] // 2
    assert small["row_bytes"] == 56 + 4 * 4 + 512


def test_costs_are_those_of_the_prices_given() -> None:
    prices = "--ram-price 3 --disk-price 0.5 --redis-price 10 --hot-share 0.25"
    found = answer(*PAPER, *prices.split())
    gib = 2**30
    held = found["total_bytes"] / gib
    assert found["cost_per_month"]["local"] == pytest.approx(held * (0.25 * 3 + 0.5))
    assert found["cost_per_month"]["redis"] == pytest.approx(found["redis_block_bytes"] / gib * 10)
    assert found["cost_per_month"]["log"] == pytest.approx(found["log_bytes"] / gib * 0.5)
    some = answer(*PAPER, "--redis-price", "10")["cost_per_month"]
    assert (some["local"], some["log"]) == (None, None)


def test_an_overhead_of_redis_that_was_measured() -> None:
    found = answer(*PAPER, "--redis-overhead", "0.1")
    assert found["redis_block_bytes"] == round(1.1 * found["payload_bytes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--users", "0", "--rows", "5"], "users and rows must be at least 1"),
        (["--users", "9", "--rows", "5", "--dtype", "fp8"], "dtype must be one of"),
        (["--users", "9", "--rows", "5", "--depth", "-1"], "depth >= 0"),
        (["--users", "9", "--rows", "5", "--remote-share", "2"], "between 0 and 1, got 2"),
        (["--users", "9", "--rows", "5", "--layers-read", "3"], "between 0 and the depth 2"),
        ([*PAPER, "--shard-gib", "1"], "a pool has at most 256, one per bucket"),
        (["--users", "9", "--rows", "5", "--node-gib", "0"], "bytes of a node must be at least 1"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: list[str], message: str) -> None:
    result = plan(*options)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_bytes_are_shown_in_decimal_units() -> None:
    shown = [show_bytes(number) for number in (0, 999, 1_000, 2_500_000, 60e12)]
    assert shown == ["0 B", "999 B", "1.00 kB", "2.50 MB", "60.00 TB"]


def test_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer(*PAPER)
    assert list(tmp_path.iterdir()) == []
