"""The closed loop on a small scale: the planted effect is found, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.paper import ab_loop


def test_small_loop_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output, plot = tmp_path / "ab.json", tmp_path / "ab.png"
    scale = {"users": 1500, "history-per-user": 10, "groups": 40, "users-per-group": 80}
    scale |= {"group-history-per-user": 5}
    options = [f"--{name}={value}" for name, value in scale.items()]
    ab_loop.main([*options, f"--output={output}", f"--plot={plot}"])
    last_line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last_line == json.loads(output.read_text())
    assert last_line["planted_found"] == 1
    assert last_line["null_excludes_zero"] == 0
    assert last_line["calibration_error"] < 0.12  # of 40 experiments: 3.5 standard errors
    assert plot.stat().st_size > 10_000
