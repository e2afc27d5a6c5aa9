"""One plain Redis for the session; every test has a pool of its own in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from redis_servers import TestServer, redis_server

from cache_actors.tiers.redis_tier import RedisTier

_POOL_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def session_redis() -> Iterator[TestServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def pool_name() -> str:
    return f"pool-{next(_POOL_NUMBERS)}"


@pytest.fixture
def tier(session_redis: TestServer, pool_name: str) -> Iterator[RedisTier]:
    tier = RedisTier.connect(session_redis.url, pool_name)
    yield tier
    tier.close()
