"""What is it that answers at an address? Asked before anything is sent to it in earnest."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from dataclasses import replace

from cache_actors.tiers.durable_tier import DurableTierError, DurableTierUnavailableError
from cache_actors.tiers.redis_url import RedisAddress, RedisUrl

_FIRST_BYTES = 256
# Redis reads this as PING and an empty line; a server of lines or of HTTP answers with its own
# kind of complaint.
_QUESTION = b"PING\r\n\r\n"
_TLS_RECORDS = (b"\x15\x03", b"\x16\x03")


class RedisTierError(DurableTierError):
    """What the Redis URL leads to can't be the durable tier."""


def check_speaks_redis(url: RedisUrl, address: RedisAddress | None) -> None:
    """Refuse a server that isn't a Redis, before redis-py misreads it.

    Raises:
        RedisTierError: names what answered.
        DurableTierUnavailableError: nothing answered in time.
    """
    place = f"{url}" if address is None else f"{url.scheme}://{address}"
    try:
        with _connect(url, address) as connection:
            connection.sendall(_QUESTION)
            answer = connection.recv(_FIRST_BYTES)
    except ssl.SSLCertVerificationError as error:
        raise RedisTierError(
            f"the certificate of {place} was refused: {error.verify_message}; set ssl_ca_certs to "
            "the file of the authority that signed it, and use the host name it was made for"
        ) from None
    except ssl.SSLError as error:
        raise RedisTierError(
            f"{place} does not speak TLS as expected ({error.reason}); use redis:// for a server "
            "without TLS, and check ssl_certfile and ssl_keyfile for one that asks for them"
        ) from None
    except FileNotFoundError as error:
        raise _absent_file(url, place, error) from None
    except OSError as error:
        if url.is_tls and isinstance(error, TimeoutError):
            _check_not_plain(url, address, place)
        if not url.is_tls and isinstance(error, ConnectionResetError):
            _check_not_tls(url, address, place)
        raise DurableTierUnavailableError(
            f"no answer from {place}: {type(error).__name__}: {error}"
        ) from None
    _check_answer(place, answer)


def check_server_facts(place: str, url: RedisUrl, facts: Mapping[str, object]) -> None:
    """Refuse a Redis that is a cluster node, a sentinel or a replica where none is expected."""
    mode = str(facts.get("redis_mode", "standalone"))
    if mode == "sentinel":
        raise RedisTierError(f"{place} is a Redis Sentinel, which keeps no data; give the server")
    if url.is_cluster and mode != "cluster":
        raise RedisTierError(f"{place} is a Redis server of its own, not a Redis Cluster; use "
                             f"{url.scheme.removesuffix('+cluster')}://")  # fmt: skip
    if not url.is_cluster and mode == "cluster":
        raise RedisTierError(f"{place} is a node of a Redis Cluster; use {_cluster_scheme(url)}")
    if not url.is_cluster and facts.get("role") == "slave":
        raise RedisTierError(f"{place} is a replica, which takes no writes; give its primary")


def _cluster_scheme(url: RedisUrl) -> str:
    return "rediss+cluster://" if url.is_tls else "redis+cluster://"


def _absent_file(url: RedisUrl, place: str, error: OSError) -> DurableTierError:
    if url.unix_path is not None:
        return DurableTierUnavailableError(f"no answer from {place}: there is no such socket")
    return RedisTierError(f"a file that the URL of {place} names can't be read: {error.strerror}")


def _connect(url: RedisUrl, address: RedisAddress | None) -> socket.socket:
    connect_timeout_s, timeout_s = url.connect_timeout_ms / 1000, url.timeout_ms / 1000
    if address is None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(connect_timeout_s)
            connection.connect(url.unix_path or "")
        except BaseException:
            connection.close()
            raise
    else:
        connection = socket.create_connection((address.host, address.port), connect_timeout_s)
    connection.settimeout(timeout_s)
    if not url.is_tls or address is None:
        return connection
    try:
        return _tls_context(url).wrap_socket(connection, server_hostname=address.host)
    except BaseException:
        connection.close()
        raise


def _check_not_plain(url: RedisUrl, address: RedisAddress | None, place: str) -> None:
    """A Redis without TLS takes the start of a handshake for the start of a long line, and waits
    for the rest. Tell it from one that hangs."""
    try:
        with _connect(replace(url, scheme="redis"), address) as connection:
            connection.sendall(_QUESTION)
            answer = connection.recv(_FIRST_BYTES)
    except OSError:
        return
    if answer.startswith((b"+", b"-")):
        raise RedisTierError(f"{place} does not speak TLS; use redis:// in the Redis URL")


def _check_not_tls(url: RedisUrl, address: RedisAddress | None, place: str) -> None:
    """A Redis with TLS hangs up on anything else. Tell it from one that dies just now."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent to it, and it isn't used
    try:
        with _connect(url, address) as connection, context.wrap_socket(connection):
            pass
    except OSError:
        return
    raise RedisTierError(f"{place} speaks TLS; use rediss:// in the Redis URL")


def _tls_context(url: RedisUrl) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=url.ssl_ca_certs)
    context.check_hostname = url.ssl_check_hostname
    if url.ssl_certfile is not None:
        context.load_cert_chain(url.ssl_certfile, url.ssl_keyfile)
    return context


def _check_answer(place: str, answer: bytes) -> None:
    """Redis answers +PONG, or - and why not (it wants a login first, or is loading)."""
    if answer.startswith((b"+PONG", b"-NOAUTH", b"-LOADING", b"-ERR", b"-NOPERM", b"-BUSY")):
        return
    if answer.startswith(b"-DENIED"):
        raise RedisTierError(
            f"the Redis at {place} is in protected mode and refuses other machines; give it a "
            "password (requirepass or ACL) and put it in the URL"
        )
    if not answer:
        raise RedisTierError(
            f"{place} closed the connection without an answer; it is not a Redis, or it needs "
            "TLS (rediss://)"
        )
    if answer.startswith(_TLS_RECORDS):
        raise RedisTierError(f"{place} answers in TLS; use rediss:// in the Redis URL")
    shown = answer.split(b"\r\n")[0][:80]
    kind = "an HTTP server" if answer.startswith((b"HTTP/", b"<")) else "not a Redis"
    raise RedisTierError(
        f"{place} is {kind}: it answered {shown!r} to PING; give the URL of a Redis"
    )
