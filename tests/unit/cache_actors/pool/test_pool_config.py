"""Settings of a pool: their stored form, and which of them may change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cache_actors.pool.config import PoolConfig, PoolConfigError, claim_config, load_config
from cache_actors.store.limits import StoreLimits

CONFIG = PoolConfig(
    replicas=2,
    limits=StoreLimits(1 << 30, 200, 3600.0, (("ranking-l2-d32-float16-all-e0", 1 << 28),)),
    durability="machine",
    redis_url="redis://user:${REDIS_PASSWORD}@host:6379/0",
    local_dir=Path("/mnt/disk"),
)


@pytest.mark.parametrize("config", [PoolConfig(), CONFIG])
def test_settings_survive_storing(tmp_path: Path, config: PoolConfig) -> None:
    path = tmp_path / "pool" / "pool.json"
    assert claim_config(path, config) == config
    assert load_config(path) == config
    assert claim_config(path, None) == config


def test_a_secret_is_stored_as_the_name_of_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_PASSWORD", "hunter2")
    claim_config(tmp_path / "pool.json", CONFIG)
    assert "${REDIS_PASSWORD}" in (tmp_path / "pool.json").read_text()
    assert "hunter2" not in (tmp_path / "pool.json").read_text()


def test_limits_durability_and_redis_may_change(tmp_path: Path) -> None:
    path = tmp_path / "pool.json"
    claim_config(path, CONFIG)
    changed = replace(CONFIG, limits=StoreLimits(), durability="process", redis_url=None)
    assert claim_config(path, changed) == changed
    assert load_config(path) == changed


@pytest.mark.parametrize("change", [{"replicas": 1}, {"local_dir": None}])
def test_what_decides_where_rows_are_may_not_change(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "pool.json"
    claim_config(path, CONFIG)
    with pytest.raises(PoolConfigError, match=f"has {next(iter(change))}=.*, got a request for"):
        claim_config(path, replace(CONFIG, **change))
    assert load_config(path) == CONFIG


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"replicas": 0}, "replicas must be 1 or 2"),
        ({"replicas": 3}, "replicas must be 1 or 2"),
        ({"durability": "galaxy"}, "durability must be one of"),
        ({"local_dir": Path("here")}, "absolute path"),
        ({"redis_url": "http://host"}, "redis://"),
        ({"redis_url": "redis://host:port"}, "a Redis URL needs"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(PoolConfigError, match=message):
        PoolConfig(**wrong)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 9}', '{"format": 1, "limits": {}}'])
def test_damaged_settings_are_named_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "pool.json"
    path.write_text(text)
    with pytest.raises(PoolConfigError, match=r"pool\.json are unreadable"):
        claim_config(path, None)
    assert path.read_text() == text
    with pytest.raises(PoolConfigError, match="start the pool first"):
        load_config(tmp_path / "other.json")
