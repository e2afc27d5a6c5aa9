"""Calls to whichever replica of a shard leads, through restarts and changes of the leader."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from cache_actors.pool.errors import MemoryUnavailable, NotLeaderError
from cache_actors.pool.replica_set import ReplicaRecord
from cache_actors.pool.shard_link import RETRY_PAUSE_S, PoolInfo, ShardLink

_TAKE_LEAD_S = 10.0


class LeaderLink:
    """One shard as seen from this process. Safe to use from threads."""

    def __init__(self, pool: PoolInfo, shard: int) -> None:
        self.pool, self.shard = pool, shard
        self.record = ReplicaRecord(pool.record_directory(shard))
        self.links = [ShardLink(pool, shard, r) for r in range(pool.config.replicas)]

    @property
    def leader(self) -> ShardLink:
        """The replica that takes saves, as far as is known."""
        return self.links[self.record.recent().leader or 0]

    def submit(self, method: str, *args: object) -> tuple[ShardLink, Any]:
        """Send a call to the leader; what is returned is for `result`."""
        link = self.leader
        return link, link.submit(method, *args)

    def result(self, sent: tuple[ShardLink, Any], timeout_s: float) -> Any:
        """The reply to a call, or the error that the shard raised."""
        link, reply = sent
        return link.result(reply, timeout_s)

    def call(self, method: str, *args: object, timeout_s: float) -> Any:
        """One attempt at a call."""
        return self.result(self.submit(method, *args), timeout_s)

    def call_until(
        self,
        method: str,
        *args: object,
        attempt_s: float,
        deadline_s: float,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Any:
        """Call until a leader answers or ``deadline_s`` have passed. Only for idempotent calls.

        ``is_wanted`` is asked after each attempt that failed: false ends it with that failure.
        """
        deadline = time.monotonic() + deadline_s
        while True:
            left_s = max(deadline - time.monotonic(), RETRY_PAUSE_S)
            try:
                return self.call(method, *args, timeout_s=min(attempt_s, left_s))
            except MemoryUnavailable as error:
                if not is_wanted():
                    raise
                if time.monotonic() + RETRY_PAUSE_S >= deadline:
                    raise self.leader.unavailable(
                        f"gave no answer for {deadline_s:.0f} s"
                    ) from error
                self._look_for_leader(error)
            time.sleep(RETRY_PAUSE_S)

    def _look_for_leader(self, error: MemoryUnavailable) -> None:
        """Read the record again; where the leader is silent, ask the other members to lead."""
        now = self.record.current()
        if isinstance(error, NotLeaderError) or now.leader is None:
            return
        for other in now.replicas[1:]:
            try:
                self.links[other].call("take_lead", timeout_s=_TAKE_LEAD_S)
                self.record.current()
                return
            except MemoryUnavailable:
                continue
