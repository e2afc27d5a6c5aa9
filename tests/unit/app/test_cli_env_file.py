from __future__ import annotations

from pathlib import Path

import pytest

from app.cli.env_file import read_env_file

REPO = Path(__file__).resolve().parents[3]


def test_the_shipped_files_are_understood():
    default = read_env_file(REPO / "cluster/env/default.env")
    fast = read_env_file(REPO / "cluster/env/fast.env")
    assert fast["RAY_event_stats"] == "0"  # Ray's own settings are written as Ray reads them
    assert fast["RAY_SERVE_ENABLE_HA_PROXY"] == fast["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    assert set(default.items()) < set(fast.items())


@pytest.mark.parametrize(
    "line", ["RAY_A='1'", "RAY_A=$(id)", "export RAY_A=1", "PATH=/tmp", "RAY_A = 1", "RAY_A=1; ls"]
)
def test_what_a_shell_would_do_more_with_is_refused(tmp_path, line):
    path = tmp_path / "some.env"
    path.write_text(f"# comment\n\n{line}\n")
    with pytest.raises(ValueError, match="line 3: expected RAY_NAME=value"):
        read_env_file(path)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match="cannot read"):
        read_env_file(tmp_path / "absent.env")
