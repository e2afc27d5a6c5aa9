"""A redis-server with both its addresses, which a benchmark may also kill and start again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.perf.redis_server import RedisServer, start_on_free_port


@dataclass(frozen=True)
class RedisProcess:
    """The server, its address by TCP, as clients come by default, and by its Unix socket."""

    server: RedisServer
    tcp_url: str
    unix_url: str


@contextmanager
def redis_process() -> Iterator[RedisProcess]:
    """A server of its own, without persistence, gone with the block."""
    # Not under a deep temporary directory: a unix socket's path has 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="marm-redis-", dir="/tmp") as directory:
        server, port = start_on_free_port(Path(directory))
        try:
            yield RedisProcess(
                server, f"redis://127.0.0.1:{port}/0", f"unix://{server.unix_path}?db=0"
            )
        finally:
            server.kill()
