"""What is said of settings that differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache_actors.pool.config import PoolConfig, describe_change
from cache_actors.pool.lifecycle import stored_config, stored_pool
from cache_actors.pool.placement import PlacementError
from cache_actors.store.limits import StoreLimits

WITH_REDIS = PoolConfig(redis_url="redis://:hunter2@redis")


def test_only_what_differs_is_named() -> None:
    limited = PoolConfig(limits=StoreLimits(max_rows_per_user=7), durability="machine")
    said = describe_change(PoolConfig(), limited)
    assert "durability process (asked for: machine)" in said
    assert "max_rows_per_user=7" in said
    assert "redis" not in said
    assert describe_change(limited, limited) == ""


def test_a_url_is_not_shown() -> None:
    other = PoolConfig(redis_url="redis://:hunter3@redis")
    assert describe_change(WITH_REDIS, PoolConfig()) == "redis_url given (asked for: none)"
    assert describe_change(PoolConfig(), WITH_REDIS) == "redis_url none (asked for: given)"
    assert describe_change(WITH_REDIS, other) == "redis_url given (asked for: another one)"


def test_a_pool_that_never_was_has_no_settings(tmp_path: Path) -> None:
    assert stored_config(tmp_path) is None
    with pytest.raises(PlacementError, match="start the pool first"):
        stored_pool(tmp_path)
