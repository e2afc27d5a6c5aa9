"""The ``memory`` section of the arguments: the pool's settings, and how serving reads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from app.strict import Name, Strict
from cache_actors.pool.config import MAX_REPLICAS, PoolConfig
from cache_actors.pool.staleness import StalenessBound
from cache_actors.store.limits import Durability
from cache_actors.tiers.redis_url import check_redis_url

GIB = 1 << 30

Gib = Annotated[float, Field(ge=1 / 256, le=1 << 20)]
"""The least is what a store needs to work at all: 4 MiB."""
NamespaceName = Annotated[
    str,
    Field(pattern=r"^[a-z0-9_-]+-l\d+-d\d+-(float16|float32|int8)-[a-z0-9_]+-e\d+$"),
]


class PoolSettings(Strict):
    """Settings that a pool keeps. One that is not given stays as it was when the pool was last
    started; for a new pool the defaults here hold."""

    shards: Annotated[int, Field(ge=1, le=256)] | None = None
    """Of a new pool; afterwards `marm memory rebalance` changes it."""
    replicas: Annotated[int, Field(ge=1, le=MAX_REPLICAS)] = 1
    """Copies of every shard, on distinct nodes."""
    max_gib: Gib | None = None
    """Files of one shard, all namespaces together. Beyond it, least recently used users go."""
    max_rows_per_user: Annotated[int, Field(ge=1)] | None = None
    """Newest rows of a user that are kept."""
    ttl_s: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """Users to whom nothing was written for so long are removed."""
    quotas_gib: dict[NamespaceName, Gib] = Field(default={})
    """Of a shard's files, what single namespaces may take, by name as `marm memory status` shows
    it."""
    durability: Durability = "process"
    """What an acknowledged save survives: the death of every process, or of the machine too."""
    redis_url: str | None = None
    """The durable tier. ``${NAME}`` is taken from the environment of every node."""
    local_dir: str | None = None
    """Where nodes keep the shards' files, an absolute path; the home when not given."""

    @field_validator("redis_url")
    @classmethod
    def _is_redis_url(cls, url: str | None) -> str | None:
        if url is not None:
            check_redis_url(url)
        return url

    @field_validator("local_dir")
    @classmethod
    def _is_absolute(cls, path: str | None) -> str | None:
        if path is not None and not Path(path).is_absolute():
            raise ValueError(f"local_dir must be an absolute path, which every node has: {path}")
        return path

    @model_validator(mode="after")
    def _quotas_fit(self) -> PoolSettings:
        largest = max(self.quotas_gib.values(), default=0.0)
        if self.max_gib is not None and largest > self.max_gib:
            raise ValueError(
                f"quotas_gib must be at most max_gib={self.max_gib}, got {largest}; lower it"
            )
        return self

    def over(self, stored: PoolConfig | None) -> PoolConfig | None:
        """The settings to start a pool with: those given here, the others as ``stored``. None, for
        whatever is stored, when none are given."""
        given = self.model_fields_set & set(PoolSettings.model_fields)
        if not given - {"shards"}:
            return None
        base = PoolConfig() if stored is None else stored
        chosen = {name: value for name, value in self._pool_values().items() if name in given}
        limits = {field: value for name, field, value in self._limit_values() if name in given}
        return replace(base, **chosen, limits=replace(base.limits, **limits))

    def _pool_values(self) -> dict[str, Any]:
        return {
            "replicas": self.replicas,
            "durability": self.durability,
            "redis_url": self.redis_url,
            "local_dir": None if self.local_dir is None else Path(self.local_dir),
        }

    def _limit_values(self) -> tuple[tuple[str, str, Any], ...]:
        """What a setting is called here, in `StoreLimits`, and its value there."""
        quotas = tuple((name, round(gib * GIB)) for name, gib in sorted(self.quotas_gib.items()))
        return (
            ("max_gib", "max_bytes", None if self.max_gib is None else round(self.max_gib * GIB)),
            ("max_rows_per_user", "max_rows_per_user", self.max_rows_per_user),
            ("ttl_s", "ttl_s", self.ttl_s),
            ("quotas_gib", "namespace_bytes", quotas),
        )


class StalenessArgs(Strict):
    """How old rows may be that serving reads; older ones count as not computed."""

    max_steps: Annotated[int, Field(ge=0)] | None = None
    """Training steps behind the newest row."""
    max_age_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Seconds since the row was computed."""

    def bound(self) -> StalenessBound:
        """As readers of the memory take it."""
        return StalenessBound(self.max_steps, self.max_age_s)


class MemoryArgs(PoolSettings):
    """The pool of memory shards. It outlives the application and is shared with training."""

    pool: Name = "default"
    await_restore: bool = False
    """Not ready before `marm memory restore` has finished: for a new cluster that is refilled from
    a snapshot. One that is under way is waited for in any case."""
    staleness: StalenessArgs = StalenessArgs()
