"""What a replica of a shard tells of itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cache_actors.pool.config import PoolConfig


@dataclass(frozen=True)
class ShardInfo:
    """Where a replica runs: a process on ``node_id`` reads ``path`` itself, others ask the actor.

    Attributes:
        generation: which store it has; another one after it had to start empty.
        is_member: whether it has every acknowledged row, so that it may be read.
        leads: whether it takes the saves.
        is_warm: whether users that are absent here are absent from the durable tier too.
        config: the settings it was started with.
    """

    shard: int
    replica: int
    epoch: int
    node_id: str
    pid: int
    path: Path
    generation: str
    is_member: bool
    leads: bool
    is_warm: bool
    config: PoolConfig
