"""The memory's benchmark as a user runs it, at sizes that show only that all of it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

KEYS = (
    "read_over_memcpy",
    "read_over_redis_get",
    "read_over_redis_mget",
    "read_p99_over_p50",
    "batch_read_over_gather",
    "write_over_redis",
    "bytes_over_payload",
    "read_exponent",
    "read_100k_over_1k",
)


def test_the_benchmark_ends_with_a_json_line_of_every_figure(tmp_path: Path) -> None:
    output = tmp_path / "results" / "memory.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.perf.memory", "--quick"),
            *("--output", str(output), "--scratch", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    line = json.loads(done.stdout.splitlines()[-1])
    assert line == json.loads(output.read_text())
    for key in KEYS:
        assert line[key] > 0
        assert line["figures"][key]["target"]["value"] > 0
        assert line["figures"][key]["holds"] in (True, False)
    # The writer and all files are gone with the run.
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
