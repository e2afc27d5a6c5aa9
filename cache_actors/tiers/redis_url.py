"""Where a Redis is and how to log in, from a URL whose secrets never show.

    redis://[user:password@]host[:port][/db]           one server
    rediss://...                                       one server, over TLS
    unix://[user:password@]/path/to.sock[?db=0]        one server, on this machine
    redis+cluster://...host[:port][,host[:port]...]    a Redis Cluster, and any of its nodes
    rediss+cluster://...                               a Redis Cluster, over TLS

A part written ``${NAME}`` (or the whole URL) is taken from the environment, so that a configuration
which is stored or shown holds no secret. Percent-escapes are decoded in the user and password.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

DEFAULT_PORT = 6379
DEFAULT_TIMEOUT_MS = 1000
DEFAULT_CONNECT_TIMEOUT_MS = 500

SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster")

_PLACEHOLDER = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_HOST_PORT = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.%]+)\]|(?P<host>[^\s:,\[\]@]+))(?::(?P<port>\d+))?"
)


class RedisUrlError(ValueError):
    """A Redis URL that can't be used. Its message never holds a secret."""


@dataclass(frozen=True)
class RedisAddress:
    """Host and TCP port of one server."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True)
class RedisUrl:
    """A parsed URL. ``str()`` of it is safe to show.

    Attributes:
        addresses: one server, or some nodes of a cluster; empty for a unix socket.
        unix_path: path of a unix socket, or None.
        timeout_ms: how long one reply may take. A read on the request path waits no longer.
        connect_timeout_ms: how long connecting may take.
        ssl_ca_certs: file of the authorities to trust; the system's where None.
        ssl_certfile, ssl_keyfile: this side's certificate, for servers that ask for one.
        ssl_check_hostname: whether the certificate must name the host.
    """

    scheme: str
    addresses: tuple[RedisAddress, ...]
    unix_path: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    db: int = 0
    timeout_ms: int = DEFAULT_TIMEOUT_MS
    connect_timeout_ms: int = DEFAULT_CONNECT_TIMEOUT_MS
    ssl_ca_certs: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_check_hostname: bool = True

    @property
    def is_cluster(self) -> bool:
        """Whether the URL names a Redis Cluster."""
        return self.scheme.endswith("+cluster")

    @property
    def is_tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.scheme.startswith("rediss")

    def __str__(self) -> str:
        login = "" if self.username is None else self.username
        if self.password is not None:
            login += ":***"
        where = self.unix_path or ",".join(map(str, self.addresses))
        return f"{self.scheme}://{login}{'@' if login else ''}{where}" + (
            f" db {self.db}" if self.db else ""
        )


def parse_redis_url(text: str, environ: Mapping[str, str]) -> RedisUrl:
    """The URL in ``text``, with ``${NAME}`` taken from ``environ``.

    Raises:
        RedisUrlError: says what was expected, without the secret that was given.
    """
    whole = _PLACEHOLDER.fullmatch(text.strip())
    if whole is not None:
        text = _expand(text.strip(), environ)
    scheme, separator, rest = text.strip().partition("://")
    if not separator or scheme not in SCHEMES:
        shown = scheme if separator and re.fullmatch(r"[A-Za-z0-9+.-]{1,32}", scheme) else "none"
        raise RedisUrlError(
            f"a Redis URL must start with one of {', '.join(s + '://' for s in SCHEMES)}; "
            f"its scheme is {shown}"
        )
    rest, _, query = rest.partition("?")
    options = _options(query, scheme, environ)
    login, at, place = rest.rpartition("@")
    username, password = _login(login, environ) if at else (None, None)
    if scheme == "unix":
        path = _expand(place, environ)
        if not path.startswith("/") or len(path) < 2:
            raise RedisUrlError("unix:// needs the absolute path of a socket: unix:///path/to.sock")
        return RedisUrl(scheme, (), path, username, password, **options)
    hosts, _, path = place.partition("/")
    if path:
        if "db" in options:
            raise RedisUrlError("a Redis URL must give its db once: as /db or as ?db=")
        options["db"] = _integer("db", _expand(path.rstrip("/"), environ), 0)
    if scheme.endswith("+cluster"):
        if options.get("db"):
            raise RedisUrlError("a Redis Cluster has db 0 only; leave the db out of the URL")
        addresses = tuple(_address(host, environ) for host in hosts.split(","))
    else:
        addresses = (_address(hosts, environ),)
    return RedisUrl(scheme, addresses, None, username, password, **options)


def check_redis_url(text: str) -> None:
    """Refuse a URL that can't be right whatever its placeholders stand for."""
    if _PLACEHOLDER.fullmatch(text.strip()) is None:
        parse_redis_url(text, _AnyValue())


class _AnyValue(dict[str, str]):
    """An environment in which every name has a value that fits anywhere."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> str:
        return "1"


def _expand(text: str, environ: Mapping[str, str]) -> str:
    """``text`` unescaped, with its placeholders filled in. Their values are taken as they are."""
    names_at_odd = _PLACEHOLDER.split(text)
    for index in range(0, len(names_at_odd), 2):
        names_at_odd[index] = unquote(names_at_odd[index])
    for index in range(1, len(names_at_odd), 2):
        name = names_at_odd[index]
        if name not in environ:
            raise RedisUrlError(
                f"the Redis URL takes a part from the environment variable {name}, which is not "
                "set in this process; set it, on every node"
            )
        names_at_odd[index] = environ[name]
    return "".join(names_at_odd)


def _login(text: str, environ: Mapping[str, str]) -> tuple[str | None, str | None]:
    username, colon, password = text.partition(":")
    return _expand(username, environ) or None, _expand(password, environ) if colon else None


def _address(text: str, environ: Mapping[str, str]) -> RedisAddress:
    match = _HOST_PORT.fullmatch(_expand(text, environ))
    if match is None:
        # What is wrong may be a password with a stray @ or /: don't repeat it.
        raise RedisUrlError(
            "a Redis URL needs host or host:port after the login (several, separated by commas, "
            "for a cluster); escape @ : / and ? in a password as %40 %3A %2F %3F"
        )
    port = _integer("port", match["port"] or str(DEFAULT_PORT), 1, 65535)
    return RedisAddress(match["v6"] or match["host"], port)


def _integer(name: str, text: str, least: int, most: int = 10**6) -> int:
    if not re.fullmatch(r"\d{1,7}", text) or not least <= int(text) <= most:
        raise RedisUrlError(f"{name} of a Redis URL must be a number from {least} to {most}")
    return int(text)


def _milliseconds(name: str, text: str) -> int:
    return _integer(name, text, 1)


def _db(name: str, text: str) -> int:
    return _integer(name, text, 0)


def _text(name: str, text: str) -> str:
    if not text:
        raise RedisUrlError(f"option {name} of a Redis URL must not be empty")
    return text


def _boolean(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise RedisUrlError(f"option {name} of a Redis URL must be true or false")
    return text == "true"


_OPTIONS: dict[str, Callable[[str, str], object]] = {
    "db": _db,
    "timeout_ms": _milliseconds,
    "connect_timeout_ms": _milliseconds,
    "ssl_ca_certs": _text,
    "ssl_certfile": _text,
    "ssl_keyfile": _text,
    "ssl_check_hostname": _boolean,
}


def _options(query: str, scheme: str, environ: Mapping[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in filter(None, query.split("&")):
        name, _, value = pair.partition("=")
        if name not in _OPTIONS:
            raise RedisUrlError(
                f"options of a Redis URL are {', '.join(_OPTIONS)}; one of those given is not "
                "among them (a ? in a password must be written %3F)"
            )
        if name.startswith("ssl_") and not scheme.startswith("rediss"):
            raise RedisUrlError(f"option {name} needs a URL that starts with rediss")
        options[name] = _OPTIONS[name](name, _expand(value, environ))
    return options
