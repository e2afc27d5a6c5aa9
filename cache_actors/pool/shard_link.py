"""Calls to one replica of a shard, through restarts of its actor."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from cache_actors.home import Home
from cache_actors.pool.config import PoolConfig
from cache_actors.pool.errors import MemoryUnavailable, NotLeaderError
from cache_actors.pool.placement import Placement

POOL_EPOCH = 3
"""Raise when the stored layout or the code of the shards changes: a detached actor goes on running
the code it began with, and another epoch gets actors and directories of its own."""

RETRY_PAUSE_S = 0.1

__all__ = ["POOL_EPOCH", "RETRY_PAUSE_S", "MemoryUnavailable", "PoolInfo", "ShardLink"]


@dataclass(frozen=True)
class PoolInfo:
    """What a process needs to find a running pool; small, and fit to be sent to others.

    ``placement`` is the one that held when the pool was looked up; ``pool_id`` tells the pool from
    those of other homes with the same name, and is empty where it was not looked up.
    """

    home: Home
    name: str
    ray_namespace: str
    placement: Placement
    config: PoolConfig
    pool_id: str = ""

    @property
    def tier_name(self) -> str:
        """What the pool is called in the durable tier, which pools of other homes may share."""
        return f"{self.name}-{self.pool_id}"

    @property
    def directory(self) -> Path:
        """What all shards share: placement, settings, lease, and the records of the replicas."""
        return self.home.memory / f"{self.name}-{POOL_EPOCH}"

    @property
    def placement_path(self) -> Path:
        """Where the placement is kept."""
        return self.directory / "placement.json"

    def record_directory(self, shard: int) -> Path:
        """Where the members of a shard are recorded."""
        return self.directory / f"replicas-{shard:03d}"

    def store_directory(self, shard: int, replica: int) -> Path:
        """Where a replica keeps its rows, on its own node."""
        root = self.directory
        if self.config.local_dir is not None:
            root = self.config.local_dir / f"{self.name}-{self._home_digest}-{POOL_EPOCH}"
        return root / (f"shard-{shard:03d}" + (f"-r{replica}" if replica else ""))

    def actor_name(self, shard: int, replica: int = 0) -> str:
        """Name of a replica's actor: one per home, pool name, epoch, shard and replica."""
        name = f"marm-memory-{self.name}-{self._home_digest}-e{POOL_EPOCH}-{shard:03d}"
        return name + (f"-r{replica}" if replica else "")

    @property
    def _home_digest(self) -> str:
        return hashlib.sha256(str(self.home.path).encode()).hexdigest()[:16]


class ShardLink:
    """One replica of a shard as seen from this process. Safe to use from threads."""

    def __init__(self, pool: PoolInfo, shard: int, replica: int = 0) -> None:
        self.pool = pool
        self.shard = shard
        self.replica = replica
        self._actor: Any = None

    def submit(self, method: str, *args: object) -> Any:
        """Send a call; its reply is for `result`."""
        actor = self._actor
        try:
            if actor is None:
                name = self.pool.actor_name(self.shard, self.replica)
                self._actor = actor = ray.get_actor(name, namespace=self.pool.ray_namespace)
            return getattr(actor, method).remote(*args)
        except (ValueError, RayActorError) as error:
            self._actor = None
            raise self.unavailable("is not running; start the pool") from error

    def result(self, reply: Any, timeout_s: float) -> Any:
        """The reply to a call, or the error that the shard itself raised."""
        try:
            return ray.get(reply, timeout=timeout_s)
        except RayTaskError as error:
            raise error.cause from error
        except GetTimeoutError as error:
            raise self.unavailable(f"did not answer within {timeout_s:.1f} s") from error
        except RayError as error:  # also a reply that was lost with its node
            self._actor = None  # its name may belong to a new actor by now
            raise self.unavailable("lost its process; it restarts by itself") from error

    def call(self, method: str, *args: object, timeout_s: float) -> Any:
        """One attempt at a call."""
        return self.result(self.submit(method, *args), timeout_s)

    def call_until(self, method: str, *args: object, attempt_s: float, deadline_s: float) -> Any:
        """Call until it is answered or ``deadline_s`` have passed. Only for idempotent calls."""
        deadline = time.monotonic() + deadline_s
        while True:
            try:
                left_s = max(deadline - time.monotonic(), RETRY_PAUSE_S)
                return self.call(method, *args, timeout_s=min(attempt_s, left_s))
            except NotLeaderError:
                raise
            except MemoryUnavailable as error:
                if time.monotonic() + RETRY_PAUSE_S >= deadline:
                    raise self.unavailable(f"gave no answer for {deadline_s:.0f} s") from error
            time.sleep(RETRY_PAUSE_S)

    def unavailable(self, what: str) -> MemoryUnavailable:
        """The error that says ``what`` of this shard."""
        which = f"memory shard {self.shard}" + (f" replica {self.replica}" if self.replica else "")
        return MemoryUnavailable(
            f"{which} of pool {self.pool.name!r} at {self.pool.home.path} {what}"
        )
