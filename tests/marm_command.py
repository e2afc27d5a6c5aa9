"""Running `marm` in a process of its own, as a user does."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
SERVER = Path(__file__).with_name("marm_server.py")


def run_marm_anew(*args: str) -> subprocess.CompletedProcess[str]:
    """What `marm` with these arguments did, from the start of Python on."""
    return subprocess.run(
        [sys.executable, "-c", "from app.cli.main import cli; cli()", *args],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **ENVIRONMENT},
        check=False,
    )


def run_marm(*args: str) -> subprocess.CompletedProcess[str]:
    """What `marm` with these arguments did, in a process that starts with its imports done.

    Imports take longer than most commands, and the next command needs the same ones.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as directory:
        output, errors = Path(directory) / "stdout", Path(directory) / "stderr"
        request = {
            "args": args,
            "cwd": str(Path.cwd()),
            "output": str(output),
            "errors": str(errors),
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = server.stdout.readline()
        assert code, "the process that starts commands has ended"
        return subprocess.CompletedProcess(
            ["marm", *args], int(code), output.read_text(), errors.read_text()
        )


def marm_json(*args: str) -> dict[str, Any]:
    """The JSON that a successful `marm` ends with."""
    return ending_json(run_marm(*args))


def ending_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON that a successful command ended with."""
    assert done.returncode == 0, done.stderr
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return last


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Ends when this process closes the pipe to it, at the latest with this process."""
    return subprocess.Popen(
        [sys.executable, str(SERVER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )
