"""What a pool was started with, kept next to its placement."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

from cache_actors.atomic_files import claim_file, pending_path, replace_text
from cache_actors.store.limits import UNLIMITED, Durability, StoreLimits
from cache_actors.tiers.redis_url import RedisUrlError, check_redis_url

CONFIG_FORMAT = 1
MAX_REPLICAS = 2


class PoolConfigError(ValueError):
    """The settings of a pool are invalid, unreadable, or cannot be changed that way."""


@dataclass(frozen=True)
class PoolConfig:
    """Settings of a pool.

    ``num_shards`` None takes the number that the pool was made with, or the default for a new one.
    ``redis_url`` may name environment variables as ``${NAME}`` for secrets: it is stored and sent
    as written here, and filled in only where the connection is made. ``local_dir`` is where the
    shards keep their files; None is the home. It should be a disk of the node, and it must be the
    same path on all nodes.
    """

    num_shards: int | None = None
    replicas: int = 1
    limits: StoreLimits = UNLIMITED
    durability: Durability = "process"
    redis_url: str | None = field(default=None, repr=False)  # may hold a password
    local_dir: Path | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= MAX_REPLICAS:
            raise PoolConfigError(f"replicas must be 1 or {MAX_REPLICAS}, got {self.replicas}")
        if self.durability not in get_args(Durability):
            raise PoolConfigError(
                f"durability must be one of {get_args(Durability)}, got {self.durability!r}"
            )
        if self.redis_url is not None:
            try:
                check_redis_url(self.redis_url)
            except RedisUrlError as error:
                raise PoolConfigError(str(error)) from None
        if self.local_dir is not None and not self.local_dir.is_absolute():
            raise PoolConfigError(
                f"local_dir must be an absolute path, which every node has, got {self.local_dir}"
            )

    def to_json(self) -> str:
        """The settings as stored. The number of shards is not among them: the placement has it."""
        content = asdict(self)
        del content["num_shards"]
        content["local_dir"] = None if self.local_dir is None else str(self.local_dir)
        return json.dumps({"format": CONFIG_FORMAT, **content}, indent=2)

    @staticmethod
    def from_json(text: str) -> PoolConfig:
        """The settings in ``text``."""
        try:
            content: dict[str, Any] = json.loads(text)
            stored_format = content.pop("format")
            if stored_format != CONFIG_FORMAT:
                raise PoolConfigError(
                    f"expected settings of format {CONFIG_FORMAT}, got format {stored_format!r}"
                )
            limits = content.pop("limits")
            limits["namespace_bytes"] = tuple(
                (str(name), int(quota)) for name, quota in limits["namespace_bytes"]
            )
            local_dir = content.pop("local_dir")
            return PoolConfig(
                limits=StoreLimits(**limits),
                local_dir=None if local_dir is None else Path(local_dir),
                **content,
            )
        except PoolConfigError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PoolConfigError(f"not the stored settings of a pool ({error!r})") from error


def load_config(path: Path) -> PoolConfig:
    """The settings stored at ``path``."""
    try:
        return PoolConfig.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PoolConfigError(f"no settings at {path}; start the pool first") from None
    except (PoolConfigError, UnicodeDecodeError) as error:
        raise PoolConfigError(
            f"settings {path} are unreadable: {error}; restore the file, or delete it and start "
            "the pool with the settings it had"
        ) from error


def describe_change(running: PoolConfig, wanted: PoolConfig) -> str:
    """The settings that differ, without the URL of the durable tier."""
    parts = []
    for name in (each.name for each in fields(PoolConfig) if each.name != "num_shards"):
        was, asked = getattr(running, name), getattr(wanted, name)
        if was == asked:
            continue
        if name == "redis_url":
            was, asked = ("none" if url is None else "given" for url in (was, asked))
            asked = "another one" if was == asked else asked
        parts.append(f"{name} {was} (asked for: {asked})")
    return ", ".join(parts)


def check_change(path: Path, wanted: PoolConfig) -> None:
    """Refuse settings that the pool of ``path`` cannot take: it may change its limits, durability
    and Redis; what decides where rows are may not change under them."""
    if not path.exists():
        return
    stored = load_config(path)
    for name in ("replicas", "local_dir"):
        was, asked = getattr(stored, name), getattr(wanted, name)
        if was != asked:
            raise PoolConfigError(
                f"the pool at {path.parent} has {name}={was}, got a request for {asked}; ask for "
                "the same, or make a snapshot and restore it into a new pool"
            )


def claim_config(path: Path, wanted: PoolConfig | None) -> PoolConfig:
    """The settings to run with: ``wanted``, stored, or what is stored where it is None."""
    stored_form = replace(wanted or PoolConfig(), num_shards=None)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        pending = pending_path(path.parent)
        try:
            pending.write_text(stored_form.to_json(), encoding="utf-8")
            if claim_file(pending, path):
                return stored_form
        finally:
            pending.unlink(missing_ok=True)
    stored = load_config(path)
    if wanted is None or stored == stored_form:
        return stored
    check_change(path, wanted)
    replace_text(path, stored_form.to_json())
    return stored_form
