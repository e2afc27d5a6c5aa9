"""Calls to one shard of a pool, through restarts of its actor."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from cache_actors.home import Home
from cache_actors.pool.placement import Placement

POOL_EPOCH = 1
"""Raise when the stored layout or the code of the shards changes: a detached actor goes on running
the code it began with, and another epoch gets actors and directories of its own."""

RETRY_PAUSE_S = 0.1


class MemoryUnavailable(RuntimeError):  # noqa: N818
    """A shard did not answer in time, or the pool does not run."""


@dataclass(frozen=True)
class PoolInfo:
    """What a process needs to find a running pool; small, and fit to be sent to others."""

    home: Home
    name: str
    ray_namespace: str
    placement: Placement

    def actor_name(self, shard: int) -> str:
        """Name of a shard's actor: one per home, pool name, epoch and shard."""
        digest = hashlib.sha256(str(self.home.path).encode()).hexdigest()[:16]
        return f"marm-memory-{self.name}-{digest}-e{POOL_EPOCH}-{shard:03d}"


class ShardLink:
    """One shard as seen from this process. Safe to use from threads."""

    def __init__(self, pool: PoolInfo, shard: int) -> None:
        self.pool = pool
        self.shard = shard
        self._actor: Any = None

    def submit(self, method: str, *args: object) -> Any:
        """Send a call; its reply is for `result`."""
        actor = self._actor
        try:
            if actor is None:
                self._actor = actor = ray.get_actor(
                    self.pool.actor_name(self.shard), namespace=self.pool.ray_namespace
                )
            return getattr(actor, method).remote(*args)
        except (ValueError, RayActorError) as error:
            self._actor = None
            raise self._unavailable("is not running; start the pool") from error

    def result(self, reply: Any, timeout_s: float) -> Any:
        """The reply to a call, or the error that the shard itself raised."""
        try:
            return ray.get(reply, timeout=timeout_s)
        except RayTaskError as error:
            raise error.cause from error
        except GetTimeoutError as error:
            raise self._unavailable(f"did not answer within {timeout_s:.1f} s") from error
        except RayError as error:  # also a reply that was lost with its node
            self._actor = None  # its name may belong to a new actor by now
            raise self._unavailable("lost its process; it restarts by itself") from error

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
            except MemoryUnavailable as error:
                if time.monotonic() + RETRY_PAUSE_S >= deadline:
                    raise self._unavailable(f"gave no answer for {deadline_s:.0f} s") from error
            time.sleep(RETRY_PAUSE_S)

    def _unavailable(self, what: str) -> MemoryUnavailable:
        return MemoryUnavailable(
            f"memory shard {self.shard} of pool {self.pool.name!r} at {self.pool.home.path} {what}"
        )
