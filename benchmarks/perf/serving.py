"""What serving costs: whole requests over HTTP, overload, faults and new models, by environment.

    python -m benchmarks.perf.serving --env fast --output benchmarks/results/serving_fast.json

Starts redis-server, a Ray and the real application of its own, takes some minutes, prints a table
and then one JSON line. ``--env`` chooses the variables of cluster/env under which Ray and Serve
start. Whatever is compared takes turns, round by round; ratios are of medians over all rounds. A
missed target is printed, not raised: this measures, it does not judge.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from app.cli.env_file import read_env_file
from benchmarks.perf.serving_load.options import parse_options

ENV_DIRECTORY = Path(__file__).resolve().parents[2] / "cluster" / "env"

_SESSION = "benchmarks.perf.serving_load.session"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the measurement in a process that has the environment from its start on: Ray and Serve
    read their variables when they are imported."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse_options(__doc__.splitlines()[0], arguments)
    variables = read_env_file(ENV_DIRECTORY / f"{options.env}.env")
    command = [sys.executable, "-m", _SESSION, *arguments]
    sys.exit(
        subprocess.run(command, env=session_env(os.environ, variables), check=False).returncode
    )


def session_env(ours: Mapping[str, str], variables: Mapping[str, str]) -> dict[str, str]:
    """Our environment with ``variables``, and none of Serve's, or of any file of `ENV_DIRECTORY`,
    that happens to be set here."""
    ruled = {name for path in ENV_DIRECTORY.glob("*.env") for name in read_env_file(path)}
    kept = {
        name: value
        for name, value in ours.items()
        if not name.startswith("RAY_SERVE_") and name not in ruled
    }
    return {**kept, "RAY_USAGE_STATS_ENABLED": "0", **variables}


if __name__ == "__main__":
    main()
