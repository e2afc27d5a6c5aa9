"""A process that has imported `marm` and forks a process for every command. Run as a script; reads
one JSON request per line, and answers each with the exit code of its command."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from typing import Any

from app.cli.main import cli

TIMEOUT_S = 240


def become_marm(request: dict[str, Any]) -> None:
    """Turn this process into one that a shell would have started."""
    signal.alarm(TIMEOUT_S)
    os.chdir(request["cwd"])
    flags = os.O_WRONLY | os.O_CREAT
    for descriptor, path, mode in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["output"], flags),
        (2, request["errors"], flags),
    ):
        opened = os.open(path, mode, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["marm", *request["args"]]


def main() -> None:
    """Serve until nobody can ask any more."""
    gc.freeze()  # else the end of every command visits, and so copies, all that was imported
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            become_marm(json.loads(line))
            cli()
            return
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
