"""Running `marm` in a process of its own, as a user does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def run_marm(*args: str) -> subprocess.CompletedProcess[str]:
    """What `marm` with these arguments did."""
    return subprocess.run(
        [sys.executable, "-c", "from app.cli.main import cli; cli()", *args],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
        check=False,
    )


def marm_json(*args: str) -> dict[str, Any]:
    """The JSON that a successful `marm` ends with."""
    done = run_marm(*args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
