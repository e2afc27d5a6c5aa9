"""What answers wrongly, not at all, or dies: a clear error, no long wait, no lost row."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from redis_servers import (
    TestServer,
    acl_server,
    has_tls,
    make_certificate,
    redis_server,
    tls_server,
    wait_until,
)
from tier_rows import assert_same, user_rows

from cache_actors.tiers.durable_tier import DurableTierUnavailableError
from cache_actors.tiers.redis_server_check import RedisTierError
from cache_actors.tiers.redis_tier import RedisTier
from marm.memory import Namespace

NS = Namespace(depth=2, dim=8)
WIDE = Namespace(depth=4, dim=64)


@contextmanager
def answering(answer: bytes | None, on_connect: bool = False) -> Iterator[int]:
    """A TCP server that answers everything with ``answer``; None: never."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                held.append(connection)
                if answer is None:
                    continue
                if on_connect:
                    connection.sendall(answer)
                else:
                    connection.recv(64)
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_RDWR)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in held:
            connection.close()


class QuietHandler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def test_an_http_server_is_named() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), QuietHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(RedisTierError, match="an HTTP server"):
                RedisTier.connect(f"redis://127.0.0.1:{server.server_port}", "pool")
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("answer", "on_connect", "named"),
    [
        (b"ERROR\r\n", False, "not a Redis: it answered b'ERROR'"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", True, "SSH-2.0"),
        (b"\x4a\x00\x00\x00\x0a8.0.36\x00", True, "8.0.36"),
        (b"", False, "closed the connection"),
        (b"\x15\x03\x01\x00\x02\x02\x46", False, "answers in TLS; use rediss://"),
        (b"-DENIED Redis is running in protected mode\r\n", False, "protected mode"),
    ],
)
def test_another_protocol_is_named(answer: bytes, on_connect: bool, named: str) -> None:
    with answering(answer, on_connect) as port, pytest.raises(RedisTierError, match=named):
        RedisTier.connect(f"redis://127.0.0.1:{port}", "pool")


def test_a_mute_server_is_unavailable() -> None:
    with answering(None) as port:
        tier = RedisTier.connect(f"redis://127.0.0.1:{port}?timeout_ms=50", "pool")
        with pytest.raises(DurableTierUnavailableError):
            tier.check()
        assert tier.read(NS, np.array([1])).unavailable.all()
        tier.close()


def test_nobody_there_is_no_error_until_rows_are_wanted(free_port: int) -> None:
    tier = RedisTier.connect(f"redis://127.0.0.1:{free_port}", "pool")
    with pytest.raises(DurableTierUnavailableError, match="could not be stored"):
        tier.put(NS, user_rows(NS, [1]))
    with pytest.raises(DurableTierUnavailableError, match="can't be read"):
        tier.get(NS, np.array([1]))
    with pytest.raises(DurableTierUnavailableError):
        tier.forget(1, 0)
    assert not tier.stats().available
    assert tier.stats().errors == 3
    tier.close()


def test_an_absent_socket_is_unavailable() -> None:
    tier = RedisTier.connect("unix:///tmp/no-such-redis.sock", "pool")
    with pytest.raises(DurableTierUnavailableError):
        tier.check()
    tier.close()


def test_a_unix_socket(session_redis: TestServer, pool_name: str) -> None:
    tier = RedisTier.connect(session_redis.unix_url, pool_name)
    tier.put(NS, user_rows(NS, [1]))
    assert_same(tier.get(NS, np.array([1])), user_rows(NS, [1]))
    tier.close()


def test_a_db_that_is_not_there_is_named(session_redis: TestServer) -> None:
    with pytest.raises(RedisTierError, match="out of range"):
        RedisTier.connect(f"redis://127.0.0.1:{session_redis.port}/99", "pool")


def test_a_replica_is_refused(session_redis: TestServer) -> None:
    with (
        redis_server("--replicaof", "127.0.0.1", str(session_redis.port)) as replica,
        pytest.raises(RedisTierError, match="is a replica"),
    ):
        RedisTier.connect(replica.url, "pool")


NEEDED = "~marm:* +@read +@write +@scripting +info +cluster"


def test_a_user_with_just_what_is_needed(pool_name: str) -> None:
    with acl_server("marm", "s3cret", NEEDED) as server:
        tier = RedisTier.connect(server.url, pool_name)
        tier.put(NS, user_rows(NS, [1, 2]))
        tier.put(NS, user_rows(NS, [1, 2], 3, first=4))
        tier.forget(1, 2**62)
        tier.delete(np.array([2]))
        tier.set_synced("store", tier.identity())
        assert tier.get(NS, np.array([1, 2])).counts.tolist() == [0, 0]
        tier.close()


def test_logins_that_are_refused_are_named_without_the_password() -> None:
    with acl_server("marm", "s3cret", NEEDED) as server:
        for login in ("", "marm:wr0ng@", "nobody:s3cret@", ":s3cret@"):
            with pytest.raises(RedisTierError, match="login") as caught:
                RedisTier.connect(f"redis://{login}127.0.0.1:{server.port}", "pool")
            assert "wr0ng" not in str(caught.value)
            assert "s3cret" not in str(caught.value)


def test_a_user_who_may_too_little_is_told_what_is_missing() -> None:
    with acl_server("marm", "s3cret", "~other:* +@all") as server:
        tier = RedisTier.connect(server.url, "pool")
        with pytest.raises(RedisTierError, match=r"may not do .* keys marm:"):
            tier.put(NS, user_rows(NS, [1]))
        tier.close()


@pytest.mark.skipif(not has_tls(), reason="this redis-server was built without TLS")
def test_tls(pool_name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    with tls_server() as server:
        tier = RedisTier.connect(server.url, pool_name)
        tier.put(NS, user_rows(NS, range(50)))
        assert_same(tier.get(NS, np.arange(50)), user_rows(NS, range(50)))
        tier.close()
        with pytest.raises(RedisTierError, match="ssl_ca_certs"):
            RedisTier.connect(f"rediss://127.0.0.1:{server.port}", "pool")
        other, _ = make_certificate(tmp_path_factory.mktemp("other"))
        with pytest.raises(RedisTierError, match="certificate"):
            RedisTier.connect(f"rediss://127.0.0.1:{server.port}?ssl_ca_certs={other}", "pool")
        with pytest.raises(RedisTierError, match="can't be read"):
            RedisTier.connect(f"rediss://127.0.0.1:{server.port}?ssl_ca_certs=/none", "pool")
        with pytest.raises(RedisTierError, match="TLS"):
            RedisTier.connect(f"redis://127.0.0.1:{server.port}", "pool")


def test_tls_to_a_server_without_it_is_named(session_redis: TestServer) -> None:
    with pytest.raises(RedisTierError, match="TLS"):
        RedisTier.connect(f"rediss://127.0.0.1:{session_redis.port}?timeout_ms=2000", "pool")


def test_a_full_redis_refuses_and_keeps_what_it_has(pool_name: str) -> None:
    with redis_server("--maxmemory", "8mb", "--maxmemory-policy", "noeviction") as server:
        tier = RedisTier.connect(server.url, pool_name)
        tier.put(NS, user_rows(NS, [1]))
        many = user_rows(WIDE, range(2, 402), 50)
        assert many.rows.nbytes > 10 << 20
        with pytest.raises(DurableTierUnavailableError):
            tier.put(WIDE, many)
        assert_same(tier.get(NS, np.array([1])), user_rows(NS, [1]))
        tier.drop(WIDE, range(256))
        tier.put(NS, user_rows(NS, [2]))
        assert_same(tier.get(NS, np.array([2])), user_rows(NS, [2]))
        tier.close()


def test_a_redis_that_drops_what_it_holds_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with redis_server("--maxmemory", "8mb", "--maxmemory-policy", "allkeys-lru") as server:
        RedisTier.connect(server.url, "pool").close()
    assert "allkeys-lru" in caplog.text


def test_killed_during_puts(pool_name: str) -> None:
    """Users told to be saved were saved; the others can be put again."""
    rows = user_rows(WIDE, range(400), 40)
    with redis_server() as server:
        tier = RedisTier.connect(server.url, pool_name)
        saved: list[np.ndarray] = []

        def keep_putting() -> None:
            step = 1
            while not saved or saved[-1].all():
                step += 1
                changed = user_rows(WIDE, range(400), 40, step=step)
                saved.append(tier.try_put(WIDE, changed).saved)

        writer = threading.Thread(target=keep_putting)
        writer.start()
        wait_until(lambda: len(saved) >= 2, "two rounds of puts")
        server.kill()
        writer.join()
        assert not saved[-1].all()
        server.restart()
        wait_until(lambda: not tier.read(WIDE, rows.user_ids).unavailable.any(), "coming back")
        assert len(tier.get(WIDE, rows.user_ids).rows) == 0
        tier.put(WIDE, rows)
        assert_same(tier.get(WIDE, rows.user_ids), rows)
        tier.close()


def test_stopped_during_gets(pool_name: str) -> None:
    rows = user_rows(NS, range(100))
    with redis_server() as server:
        tier = RedisTier.connect(f"redis://127.0.0.1:{server.port}?timeout_ms=1000", pool_name)
        tier.put(NS, rows)
        reading = threading.Event()
        failed: list[Exception] = []

        def keep_getting() -> None:
            while True:
                try:
                    tier.get(NS, rows.user_ids)
                    reading.set()
                except DurableTierUnavailableError as error:
                    failed.append(error)
                    return

        reader = threading.Thread(target=keep_getting)
        reader.start()
        assert reading.wait(60)
        server.pause()
        reader.join(60)
        assert not reader.is_alive(), "a read waits for a stopped server"
        assert not tier.stats().available
        server.resume()
        wait_until(lambda: not tier.read(NS, rows.user_ids).unavailable.any(), "coming back")
        assert_same(tier.get(NS, rows.user_ids), rows)
        tier.close()


def test_another_server_on_the_same_port_is_noticed(pool_name: str) -> None:
    """The tier looks again who is there after every failure."""
    with redis_server() as server:
        tier = RedisTier.connect(server.url, pool_name)
        tier.put(NS, user_rows(NS, [1]))
        server.kill()
        assert tier.read(NS, np.array([1])).unavailable.all()
        with http.server.HTTPServer(("127.0.0.1", server.port), QuietHandler) as other:
            thread = threading.Thread(target=other.serve_forever)
            thread.start()
            try:
                with pytest.raises(RedisTierError, match="an HTTP server"):
                    wait_until(lambda: _answers(tier), "the tier looking again")
            finally:
                other.shutdown()
                thread.join()
        tier.close()


def _answers(tier: RedisTier) -> bool:
    try:
        return bool(tier.check())
    except DurableTierUnavailableError:
        return False
