"""A real redis-server for a benchmark: on a free port, without persistence, gone afterwards."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READY_TIMEOUT_S = 30.0
_POLL_S = 0.01
_MOST_PORTS_TRIED = 5


class RedisServerError(RuntimeError):
    """redis-server is not installed, or did not start."""


class RedisServer:
    """One redis-server process. It also listens on a unix socket, without TLS."""

    def __init__(self, directory: Path, arguments: tuple[str, ...]) -> None:
        self.directory = directory
        self.unix_path = directory / "redis.sock"
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None, "the server does not run"
        return self._process.pid

    def start(self) -> None:
        """Start the process and wait until it answers."""
        binary = shutil.which("redis-server")
        if binary is None:
            raise RedisServerError(
                "redis-server is not installed; install the redis-server package"
            )
        self.unix_path.unlink(missing_ok=True)
        log = self.directory / "redis.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [
                    binary,
                    *("--dir", str(self.directory), "--save", "", "--daemonize", "no"),
                    *("--unixsocket", str(self.unix_path), "--bind", "127.0.0.1"),
                    *self._arguments,
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RedisServerError(f"redis-server did not start: {log.read_text()[-800:]}")
            time.sleep(_POLL_S)

    def kill(self) -> None:
        """End the process at once, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(1.0)
                probe.connect(str(self.unix_path))
                probe.sendall(b"PING\r\n")
                return probe.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_on_free_port(
    directory: Path, arguments: tuple[str, ...] = (), port_setting: str = "--port"
) -> tuple[RedisServer, int]:
    """A server on a port of its own. Another process may take the port first: then try the next."""
    for attempt in range(_MOST_PORTS_TRIED):
        port = free_port()
        server = RedisServer(directory, ("--port", "0", port_setting, str(port), *arguments))
        try:
            server.start()
            return server, port
        except RedisServerError:
            if attempt == _MOST_PORTS_TRIED - 1 or shutil.which("redis-server") is None:
                raise
    raise AssertionError("unreachable")


@contextmanager
def running_redis() -> Iterator[str]:
    """The URL of a redis-server that runs inside the ``with`` block."""
    # Not under a deep temporary directory: a unix socket's path has 107 characters at most.
    directory = Path(tempfile.mkdtemp(prefix="marm-redis-", dir="/tmp"))
    server: RedisServer | None = None
    try:
        server, port = start_on_free_port(directory)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        if server is not None:
            server.kill()
        shutil.rmtree(directory, ignore_errors=True)
