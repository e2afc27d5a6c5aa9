"""The settings of a pool from command to command: what one gives, the next one keeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from marm_command import run_marm
from redis_servers import TestServer, redis_server, wait_until

from app.build import RAY_NAMESPACE
from cache_actors.pool.config import PoolConfig
from cache_actors.pool.lifecycle import connect_pool, describe_pool

pytestmark = pytest.mark.cluster

NUM_EVENTS = 300
POOL = "tiered"
TRAIN = ("--depth", "1", "--dim", "8", "--history", "5", "--stages", "ranking")


@pytest.fixture
def server() -> Iterator[TestServer]:
    with redis_server() as started:
        yield started


def running_config(home: Path) -> PoolConfig:
    (info, *_) = describe_pool(connect_pool(home, RAY_NAMESPACE, POOL))
    return info.config


def write_settings(path: Path, **settings: object) -> str:
    path.write_text(json.dumps({"memory": {"pool": POOL, **settings}}))
    return str(path)


@pytest.mark.timeout(600)
def test_a_pool_keeps_its_redis_from_command_to_command(
    tmp_path: Path, server: TestServer, address: str, marm: Callable[..., dict[str, Any]]
) -> None:
    home = tmp_path / "home"
    at_home = ("--home", str(home))
    world = ("--users", "12", "--items", "40", "--events", str(NUM_EVENTS))
    assert run_marm("world", *world, *at_home).returncode == 0

    # `train` makes a pool with Redis, and writes to it.
    asked = write_settings(
        tmp_path / "memory.yaml", redis_url=server.url, max_rows_per_user=200, max_gib=1
    )
    trained = marm("train", *at_home, *TRAIN, "--memory", asked, "--shards", "1")
    assert trained["events_seen"] == NUM_EVENTS
    made = running_config(home)
    assert (made.redis_url, made.limits.max_rows_per_user) == (server.url, 200)
    assert made.limits.max_bytes == 1 << 30
    with server.client() as client:
        wait_until(lambda: client.dbsize() > 0, "rows reaching Redis")

    # Stopped, and started by a command that is told nothing: the same settings.
    assert marm("memory", "stop", *at_home, "--pool", POOL)["stopped_shards"] == 1
    assert marm("memory", "stop", *at_home, "--pool", POOL)["stopped_shards"] == 0
    status = marm("memory", "status", *at_home, "--pool", POOL)
    assert [shard["answers"] for shard in status["shards"]] == [True]
    assert running_config(home) == made

    # Other settings are refused while it runs, in one line that shows no URL.
    bare = write_settings(tmp_path / "bare.yaml", redis_url=None)
    refused = run_marm("train", *at_home, *TRAIN, "--memory", bare, "--address", address)
    assert refused.returncode == 1
    assert "runs with redis_url given (asked for: none); stop the pool first" in refused.stderr
    assert server.url not in refused.stderr
    assert running_config(home) == made

    # After a stop they are taken; what was not mentioned stays.
    assert marm("memory", "stop", *at_home, "--pool", POOL)["stopped_shards"] == 1
    marm("train", *at_home, *TRAIN, "--memory", bare)
    changed = running_config(home)
    assert changed.redis_url is None
    assert changed.limits == made.limits


def test_a_pool_that_never_was_cannot_be_stopped(tmp_path: Path) -> None:
    done = run_marm("memory", "stop", "--home", str(tmp_path / "home"))
    assert done.returncode == 1
    assert "start the pool first" in done.stderr
    assert "Traceback" not in done.stderr
