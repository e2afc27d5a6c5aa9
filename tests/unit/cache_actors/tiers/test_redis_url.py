"""Redis URLs: every form is understood, and no secret shows."""

from __future__ import annotations

import pytest

from cache_actors.tiers.redis_url import (
    RedisAddress,
    RedisUrlError,
    check_redis_url,
    parse_redis_url,
)

SECRET = "s3cr3t-Pa55"


def test_one_server() -> None:
    url = parse_redis_url("redis://cache.internal:7000/3?timeout_ms=250", {})
    assert url.addresses == (RedisAddress("cache.internal", 7000),)
    assert (url.db, url.timeout_ms, url.is_tls, url.is_cluster) == (3, 250, False, False)
    assert (url.username, url.password) == (None, None)


def test_defaults() -> None:
    url = parse_redis_url("redis://cache", {})
    assert (url.addresses[0].port, url.db) == (6379, 0)


def test_login_with_escapes() -> None:
    url = parse_redis_url("rediss://marm:p%40ss%2F%3A@cache/0", {})
    assert (url.username, url.password, url.is_tls) == ("marm", "p@ss/:", True)


def test_a_password_alone() -> None:
    url = parse_redis_url(f"redis://:{SECRET}@cache", {})
    assert (url.username, url.password) == (None, SECRET)


def test_a_cluster_with_several_nodes_and_ipv6() -> None:
    url = parse_redis_url("rediss+cluster://u:p@a:1,b,[::1]:3/?ssl_check_hostname=false", {})
    assert [str(address) for address in url.addresses] == ["a:1", "b:6379", "[::1]:3"]
    assert (url.is_cluster, url.is_tls, url.ssl_check_hostname) == (True, True, False)


def test_a_socket() -> None:
    url = parse_redis_url("unix://marm:pw@/run/redis.sock?db=2", {})
    assert (url.unix_path, url.db, url.username) == ("/run/redis.sock", 2, "marm")


def test_parts_from_the_environment_are_taken_as_they_are() -> None:
    environ = {"HOST": "cache", "PORT": "7001", "PW": "a@b:c/d?e%41${HOST}"}
    url = parse_redis_url("redis://marm:${PW}@${HOST}:${PORT}/0", environ)
    assert url.password == environ["PW"]
    assert url.addresses == (RedisAddress("cache", 7001),)


def test_the_whole_url_from_the_environment() -> None:
    url = parse_redis_url("${URL}", {"URL": "redis://:p%40@cache"})
    assert url.password == "p@"


def test_a_variable_that_is_not_set_is_named() -> None:
    with pytest.raises(RedisUrlError, match="REDIS_PASSWORD"):
        parse_redis_url("redis://:${REDIS_PASSWORD}@cache", {})


def test_a_url_with_placeholders_can_be_checked_without_their_values() -> None:
    check_redis_url("${MARM_REDIS_URL}")
    check_redis_url("redis+cluster://marm:${PW}@${HOST}:${PORT}")
    with pytest.raises(RedisUrlError, match="must start with one of"):
        check_redis_url("http://${HOST}")


def test_str_and_repr_hide_the_password() -> None:
    url = parse_redis_url(f"redis://marm:{SECRET}@cache:1/2", {})
    assert str(url) == "redis://marm:***@cache:1 db 2"
    assert SECRET not in repr(url) + str(url)


@pytest.mark.parametrize(
    "text",
    [
        "",
        SECRET,
        f"http://u:{SECRET}@cache",
        f"redis:/u:{SECRET}@cache",
        f"redis://u:{SECRET}@",
        f"redis://u:{SECRET}/x@cache:port",
        f"redis://u:{SECRET}@cache:0",
        f"redis://u:{SECRET}@cache:99999",
        f"redis://u:{SECRET}@cache/{SECRET}",
        f"redis://u:{SECRET}@cache/-1",
        f"redis://u:{SECRET}@cache/1?db=2",
        f"redis://u:{SECRET}@cache?{SECRET}=1",
        f"redis://u:{SECRET}@cache?timeout_ms={SECRET}",
        f"redis://u:{SECRET}@cache?timeout_ms=0",
        f"redis://u:{SECRET}@cache?ssl_ca_certs=/x",
        f"rediss://u:{SECRET}@cache?ssl_check_hostname={SECRET}",
        f"rediss://u:{SECRET}@cache?ssl_ca_certs=",
        f"redis+cluster://u:{SECRET}@cache/1",
        f"redis+cluster://u:{SECRET}@cache,,b",
        f"redis://u:{SECRET}@a,b",
        f"unix://u:{SECRET}@relative/path",
    ],
)
def test_what_is_wrong_is_refused_without_showing_the_secret(text: str) -> None:
    with pytest.raises(RedisUrlError) as caught:
        parse_redis_url(text, {})
    assert SECRET not in str(caught.value)
    assert caught.value.__context__ is None or SECRET not in str(caught.value.__context__)
