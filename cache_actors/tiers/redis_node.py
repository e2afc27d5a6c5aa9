"""One Redis server: many commands in one go, clear errors, and no waiting for a dead one."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cache_actors.tiers.circuit_breaker import CircuitBreaker
from cache_actors.tiers.durable_tier import DurableTierError, DurableTierUnavailableError
from cache_actors.tiers.redis_server_check import (
    RedisTierError,
    check_server_facts,
    check_speaks_redis,
)
from cache_actors.tiers.redis_url import RedisAddress, RedisUrl

Command = tuple[str | bytes | int, ...]
"""Name and arguments, as in redis-cli."""

_PASSING_ERRORS = ("OOM", "READONLY", "MISCONF", "CLUSTERDOWN", "MASTERDOWN", "NOREPLICAS", "BUSY")
"""First words of answers that may be another one later."""


class Foreign(Enum):
    """Stands for the answer of a command that met a value of another type than it is for."""

    VALUE = 0


class RedisNode:
    """A connection pool to one server behind a circuit breaker. Safe for many threads."""

    def __init__(self, url: RedisUrl, address: RedisAddress | None) -> None:
        self.place = str(url) if address is None else f"{url.scheme}://{address}"
        self.breaker = CircuitBreaker()
        self._url = url
        self._address = address
        self._known = False
        self._client = redis.Redis(connection_pool=_connection_pool(url, address))

    def run(self, commands: Sequence[Command]) -> list[Any]:
        """The answer of every command, which is an exception of redis-py where it was refused.

        Raises:
            DurableTierUnavailableError: no answer, or none asked for after recent failures.
            RedisTierError: what is there is no Redis that can be used.
        """
        if not self.breaker.allow():
            raise DurableTierUnavailableError(
                f"{self.place} did not answer; next try in {self.breaker.wait_s():.1f} s"
            )
        try:
            if not self._known:
                self._introduce()
            pipeline = self._client.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
            answers = pipeline.execute(raise_on_error=False)
        except DurableTierError:
            self._failed()
            raise
        except (redis.RedisError, OSError) as error:
            self._failed()
            raise self._meaning(error) from error
        self.breaker.succeeded()
        return answers

    def facts(self, section: str) -> dict[str, Any]:
        """What the server says of itself now (INFO); one section of it is far less to read."""
        (answer,) = self.run([("INFO", section)])
        if isinstance(answer, Exception):
            raise self._meaning(answer) from answer
        return answer

    def judge(self, answer: Any) -> Any:
        """An answer of `run` for callers: a value, `Foreign.VALUE`, or a
        `DurableTierUnavailableError`, not raised, where it may be another one later."""
        if not isinstance(answer, Exception):
            return answer
        if "WRONGTYPE" in str(answer):
            return Foreign.VALUE
        meaning = self._meaning(answer)
        if isinstance(meaning, DurableTierUnavailableError):
            return meaning
        raise meaning from answer

    def close(self) -> None:
        """Close all connections."""
        self._client.close()
        self._client.connection_pool.disconnect()

    def _introduce(self) -> None:
        """See who is there, at first and after every failure: it may be somebody else now."""
        check_speaks_redis(self._url, self._address)
        check_server_facts(self.place, self._url, self._client.info())
        self._known = True

    def _failed(self) -> None:
        self._known = False
        self.breaker.failed()

    def _meaning(self, error: Exception) -> DurableTierError:
        """redis-py's ``error`` as ours. Server messages hold no secrets; our own text neither."""
        if isinstance(error, redis.AuthenticationError):
            return RedisTierError(
                f"{self.place} refused the login: {error}; check user and password of the URL"
            )
        if isinstance(error, redis.exceptions.NoPermissionError):
            return RedisTierError(
                f"the user of the Redis URL may not do what is needed on {self.place}: {error}; "
                "allow it the keys marm:* and the commands @read @write @scripting info cluster"
            )
        passing = isinstance(error, (redis.ConnectionError, redis.TimeoutError, OSError))
        first_word = str(error).split(" ", 1)[0].upper()
        named = isinstance(
            error,
            (
                redis.exceptions.OutOfMemoryError,
                redis.ReadOnlyError,
                redis.exceptions.ClusterDownError,
            ),
        )
        if passing or named or first_word in _PASSING_ERRORS:
            return DurableTierUnavailableError(f"{self.place}: {type(error).__name__}: {error}")
        return RedisTierError(f"{self.place} refused a command: {error}")


def _connection_pool(url: RedisUrl, address: RedisAddress | None) -> redis.ConnectionPool:
    """Connections that fail instead of waiting long, and try a lost connection once again."""
    settings: dict[str, Any] = {
        "db": url.db,
        "username": url.username,
        "password": url.password,
        "socket_timeout": url.timeout_ms / 1000,
        "socket_connect_timeout": url.connect_timeout_ms / 1000,
        "retry": Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        "protocol": 2,
    }
    if address is None:
        return redis.ConnectionPool(
            connection_class=redis.UnixDomainSocketConnection, path=url.unix_path, **settings
        )
    settings |= {"host": address.host, "port": address.port}
    if not url.is_tls:
        return redis.ConnectionPool(**settings)
    return redis.ConnectionPool(
        connection_class=redis.SSLConnection,
        ssl_ca_certs=url.ssl_ca_certs,
        ssl_certfile=url.ssl_certfile,
        ssl_keyfile=url.ssl_keyfile,
        ssl_check_hostname=url.ssl_check_hostname,
        **settings,
    )
