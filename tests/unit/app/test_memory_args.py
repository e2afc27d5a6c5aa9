"""The ``memory`` section: what may be written, and what it makes of the stored settings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from app.args import AppArgs
from app.cli.memory.settings import read_memory_args
from app.memory_args import GIB, MemoryArgs
from cache_actors.pool.config import PoolConfig
from cache_actors.pool.staleness import StalenessBound
from cache_actors.store.limits import StoreLimits

NAME = "ranking-l2-d32-float16-all-e0"
EVERYTHING = {
    "replicas": 2,
    "max_gib": 8,
    "max_rows_per_user": 1000,
    "ttl_s": 86400,
    "quotas_gib": {NAME: 4.5},
    "durability": "machine",
    "redis_url": "rediss://marm:${REDIS_PASSWORD}@redis:6380/0",
    "local_dir": "/mnt/nvme",
}
CONFIG = PoolConfig(
    replicas=2,
    limits=StoreLimits(8 * GIB, 1000, 86400.0, ((NAME, 4_831_838_208),)),
    durability="machine",
    redis_url="rediss://marm:${REDIS_PASSWORD}@redis:6380/0",
    local_dir=Path("/mnt/nvme"),
)


def test_every_setting_reaches_the_pool() -> None:
    assert MemoryArgs.model_validate(EVERYTHING).over(None) == CONFIG


def test_the_examples_in_the_shipped_config_are_valid_and_complete() -> None:
    shipped = Path(__file__).resolve().parents[3] / "serve_config.yaml"
    text = re.sub(r"^        # ", "        ", shipped.read_text("utf-8"), flags=re.MULTILINE)
    (application,) = yaml.safe_load(text)["applications"]
    assert set(application["args"]["memory"]) == set(MemoryArgs.model_fields)
    config = AppArgs.model_validate(application["args"]).memory.over(None)
    assert config is not None
    assert config.replicas == 2


def test_what_is_not_given_stays_as_stored() -> None:
    assert MemoryArgs().over(CONFIG) is None
    assert MemoryArgs(pool="other", shards=3, await_restore=True).over(CONFIG) is None
    fewer = MemoryArgs(max_rows_per_user=10).over(CONFIG)
    assert fewer is not None
    assert (fewer.redis_url, fewer.replicas) == (CONFIG.redis_url, 2)
    assert fewer.limits == StoreLimits(8 * GIB, 10, 86400.0, ((NAME, 4_831_838_208),))


def test_null_takes_a_setting_away() -> None:
    without = MemoryArgs.model_validate(
        {"redis_url": None, "max_gib": None, "ttl_s": None, "quotas_gib": {}}
    ).over(CONFIG)
    assert without is not None
    assert without.redis_url is None
    assert without.limits == StoreLimits(max_rows_per_user=1000)
    assert without.durability == "machine"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"replicas": 3}, "less than or equal to 2"),
        ({"max_gib": 0}, "memory.max_gib\n.*greater than or equal to 0.0039"),
        ({"max_rows_per_user": 0}, "greater than or equal to 1"),
        ({"ttl_s": 0.5}, "greater than or equal to 1"),
        ({"ttl_s": float("nan")}, "finite number|greater than or equal to 1"),
        ({"quotas_gib": {"some name": 1}}, "should match pattern"),
        ({"max_gib": 1, "quotas_gib": {NAME: 2}}, "at most max_gib=1.0, got 2.0"),
        ({"durability": "disk"}, "'process' or 'machine'"),
        ({"redis_url": "http://redis"}, "must start with one of redis://"),
        ({"local_dir": "marm-rows"}, "must be an absolute path"),
        ({"staleness": {"max_steps": -1}}, "memory.staleness.max_steps"),
        ({"staleness": {"max_hours": 1}}, "Extra inputs"),
        ({"max_bytes": 1}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(section: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AppArgs.model_validate({"memory": section})


def test_an_error_does_not_show_a_password() -> None:
    for section in ({"redis_url": "http://:hunter2@redis"}, {"redis_url": ["redis://:hunter2@r"]}):
        with pytest.raises(ValidationError) as caught:
            AppArgs.model_validate({"memory": section, "limits": {"default_k": 300}})
        assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(PoolConfig(redis_url="redis://:hunter2@redis"))


def test_staleness_becomes_a_bound() -> None:
    args = MemoryArgs.model_validate({"staleness": {"max_steps": 100, "max_age_s": 60}})
    assert args.staleness.bound() == StalenessBound(100, 60.0)
    assert MemoryArgs().staleness.bound().is_unbounded


@pytest.mark.parametrize(
    "text",
    [
        "memory: {pool: fast, ttl_s: 60}",
        "applications: [{name: other}, {name: marm, args: {memory: {pool: fast, ttl_s: 60}}}]",
    ],
)
def test_commands_read_the_section(tmp_path: Path, text: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    assert read_memory_args(path) == MemoryArgs(pool="fast", ttl_s=60)
    assert read_memory_args(path, pool="slow", shards=3).pool == "slow"
    assert read_memory_args(path, shards=3).shards == 3
    assert read_memory_args(None) == MemoryArgs()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "must hold a mapping with 'memory'"),
        ("replicas: 2", "must hold a mapping with 'memory'"),
        ("memory: 3", "must be a mapping of settings"),
        ("memory: {shards: none}", "settings of memory in .*settings.yaml: 1 validation error"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_bad_file_is_a_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_memory_args(path)
    with pytest.raises(ValueError, match="cannot read"):
        read_memory_args(tmp_path / "absent.yaml")
