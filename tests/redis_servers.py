"""Real redis-server processes for tests: plain, with a login, with TLS, and a cluster."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from benchmarks.perf.redis_server import RedisServer, free_port, start_on_free_port

NUM_SLOTS = 16384
DEADLINE_S = 60.0
PATIENT = "timeout_ms=20000&connect_timeout_ms=20000"
"""URL options for servers that run: a busy machine must not fail a test."""


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Poll until ``condition`` holds."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {deadline_s:.0f} s"
        time.sleep(0.01)


@dataclass
class TestServer:
    """A server and its URLs."""

    __test__ = False

    server: RedisServer
    port: int
    scheme: str = "redis"
    login: str = ""
    options: str = ""

    @property
    def url(self) -> str:
        options = "&".join(filter(None, [PATIENT, self.options]))
        return f"{self.scheme}://{self.login}127.0.0.1:{self.port}/0?{options}"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.login}{self.server.unix_path}?{PATIENT}"

    def client(self) -> redis.Redis:
        """A bare client, past TLS and without a login."""
        return redis.Redis(unix_socket_path=str(self.server.unix_path), protocol=2)

    def kill(self) -> None:
        self.server.kill()

    def restart(self) -> None:
        """Start again on the same port, empty."""
        self.server.kill()
        self.server.start()

    def pause(self) -> None:
        """Stop answering without closing any connection."""
        os.kill(self.server.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.server.pid, signal.SIGCONT)


@contextmanager
def _directory() -> Iterator[Path]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    # A unix socket's path has 107 characters at most: pytest's tmp_path may be too deep.
    directory = Path(tempfile.mkdtemp(prefix="marm-redis-", dir="/tmp"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def redis_server(*arguments: str, login: str = "") -> Iterator[TestServer]:
    """One server. ``login`` is put into its URL."""
    with _directory() as directory:
        server, port = start_on_free_port(directory, arguments)
        try:
            yield TestServer(server, port, login=login)
        finally:
            server.kill()


@contextmanager
def acl_server(user: str, password: str, rules: str) -> Iterator[TestServer]:
    """A server that only ``user`` may use, within ``rules``."""
    arguments = ("--user", user, "on", f">{password}", *rules.split(), "--user", "default", "off")
    with redis_server(*arguments, login=f"{user}:{password}@") as server:
        yield server


@contextmanager
def tls_server() -> Iterator[TestServer]:
    """A server that speaks TLS only; its URL names the certificate to trust."""
    with _directory() as directory:
        certificate, key = make_certificate(directory)
        server, port = start_on_free_port(
            directory,
            (
                *("--tls-auth-clients", "no", "--tls-ca-cert-file", str(certificate)),
                *("--tls-cert-file", str(certificate), "--tls-key-file", str(key)),
            ),
            port_setting="--tls-port",
        )
        try:
            options = f"ssl_ca_certs={certificate}"
            yield TestServer(server, port, scheme="rediss", options=options)
        finally:
            server.kill()


def has_tls() -> bool:
    """Whether the installed redis-server was built with TLS.

    It names the first setting that it doesn't know, and never starts: the last one is unknown.
    """
    if shutil.which("redis-server") is None:
        return False
    answer = subprocess.run(
        ["redis-server", "--port", "0", "--tls-port", "0", "--no-such-setting", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    return "no-such-setting" in answer.stdout + answer.stderr


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    certificate, key = directory / "server.crt", directory / "server.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", str(key), "-out", str(certificate), "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


@dataclass
class TestCluster:
    """A Redis Cluster of primaries without replicas."""

    __test__ = False

    nodes: list[TestServer]

    @property
    def hosts(self) -> str:
        return ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    @property
    def url(self) -> str:
        return f"redis+cluster://{self.hosts}/?{PATIENT}"

    def wait_until_ok(self) -> None:
        def is_ok() -> bool:
            return all(_cluster_state(node) == "ok" for node in self.nodes)

        wait_until(is_ok, "the cluster coming up")


@contextmanager
def redis_cluster(num_nodes: int = 3) -> Iterator[TestCluster]:
    """A cluster whose slots are shared out evenly. Slots of live nodes work without the others."""
    directories = [
        Path(tempfile.mkdtemp(prefix="marm-redis-", dir="/tmp")) for _ in range(num_nodes)
    ]
    nodes: list[TestServer] = []
    try:
        for directory in directories:
            server, port = start_on_free_port(
                directory,
                (
                    *("--cluster-enabled", "yes", "--cluster-port", str(free_port())),
                    *("--cluster-require-full-coverage", "no", "--cluster-node-timeout", "2000"),
                ),
            )
            nodes.append(TestServer(server, port))
        _join(nodes)
        cluster = TestCluster(nodes)
        cluster.wait_until_ok()
        yield cluster
    finally:
        for node in nodes:
            node.kill()
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)


def _join(nodes: list[TestServer]) -> None:
    """Give every node its slots, and let all know each other."""
    edges = [NUM_SLOTS * index // len(nodes) for index in range(len(nodes) + 1)]
    for index, node in enumerate(nodes):
        with node.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", edges[index], edges[index + 1] - 1)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
    with nodes[0].client() as first:
        for node in nodes[1:]:
            with node.client() as client:
                bus_port = client.config_get("cluster-port")["cluster-port"]
            first.execute_command("CLUSTER", "MEET", "127.0.0.1", node.port, bus_port)

    def knows_all(node: TestServer) -> bool:
        with node.client() as client:
            return len(client.execute_command("CLUSTER", "SLOTS")) == len(nodes)

    wait_until(lambda: all(map(knows_all, nodes)), "nodes of the cluster learning of each other")


def _cluster_state(node: TestServer) -> str:
    with node.client() as client:
        text = client.execute_command("CLUSTER", "INFO")
    facts = (
        text
        if isinstance(text, dict)
        else dict(line.split(":", 1) for line in text.decode().split() if ":" in line)
    )
    state: str = facts["cluster_state"]
    return state
