"""Whether the memory pool answers, for ``/healthz``; asked at most once in a while."""

from __future__ import annotations

import threading
import time

from app.schemas import MemoryHealth
from cache_actors.pool.errors import MemoryUnavailable
from cache_actors.pool.placement import PlacementError, load_placement
from cache_actors.pool.shard_info import ShardInfo
from cache_actors.pool.shard_link import PoolInfo, ShardLink

MAX_AGE_S = 5.0
"""Probes of many load balancers must not become many calls to every shard."""

_CALL_S = 2.0


class PoolHealth:
    """What the shards of a pool said last. Safe to use from threads."""

    def __init__(self, pool: PoolInfo) -> None:
        self._pool = pool
        self._asking = threading.Lock()
        self._known: MemoryHealth | None = None
        self._known_s = 0.0

    def look(self) -> MemoryHealth:
        """The pool's state, asked anew when it is older than `MAX_AGE_S`."""
        with self._asking:
            if self._known is None or time.monotonic() - self._known_s > MAX_AGE_S:
                self._known = pool_health(self._pool)
                self._known_s = time.monotonic()
            return self._known


def pool_health(pool: PoolInfo) -> MemoryHealth:
    """Ask every replica of every shard, all at once."""
    try:
        num_shards = load_placement(pool.placement_path).num_shards
    except PlacementError as error:
        return MemoryHealth(
            pool=pool.name, shards=0, answering=0, warm=0, problem=f"memory: {error}"
        )
    links = [
        ShardLink(pool, shard, replica)
        for shard in range(num_shards)
        for replica in range(pool.config.replicas)
    ]
    answers = describe_answering(links)
    answering = {info.shard for info in answers if info.is_member}
    warm = {info.shard for info in answers if info.is_member and info.is_warm}
    silent = num_shards - len(answering)
    return MemoryHealth(
        pool=pool.name,
        shards=num_shards,
        answering=len(answering),
        warm=len(warm),
        problem=f"{silent} of {num_shards} memory shards do not answer" if silent else "",
    )


def describe_answering(links: list[ShardLink]) -> list[ShardInfo]:
    """The descriptions of those that give one in time; all have the same time."""
    deadline_s = time.monotonic() + _CALL_S
    replies = []
    for link in links:
        try:
            replies.append((link, link.submit("describe")))
        except MemoryUnavailable:
            continue
    answers = []
    for link, reply in replies:
        try:
            answers.append(link.result(reply, max(0.0, deadline_s - time.monotonic())))
        except MemoryUnavailable:
            continue
    return answers
