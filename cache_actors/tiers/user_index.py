"""Which users of a bucket the tier has, those with the newest rows first."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_actors.tiers.durable_tier import DurableTierError, DurableTierUnavailableError
from cache_actors.tiers.redis_keys import RedisKeys
from cache_actors.tiers.redis_link import KeyCommand, RedisLink
from cache_actors.tiers.redis_node import Foreign

PAGE_USERS = 256


@dataclass(frozen=True)
class UserIndex:
    """Reads the sorted sets of users."""

    link: RedisLink
    keys: RedisKeys

    def newest_first(
        self, namespace_name: str, buckets: Sequence[int]
    ) -> Iterator[NDArray[np.int64]]:
        """Users of all ``buckets`` in one order, in arrays of up to `PAGE_USERS`.

        Users that get newer rows meanwhile may come at their old place, but none is left out.
        """
        merged = heapq.merge(*(self._of_bucket(namespace_name, bucket) for bucket in buckets))
        while page := [user_id for _, user_id in islice(merged, PAGE_USERS)]:
            yield np.array(page, np.int64)

    def _of_bucket(self, namespace_name: str, bucket: int) -> Iterator[tuple[float, int]]:
        """(minus newest time, user) of a bucket. Pages go by time, not by place: places shift."""
        key = self.keys.users(namespace_name, bucket)
        newest = "+inf"
        given: set[int] = set()
        while True:
            limit = PAGE_USERS + len(given)
            words = ("ZREVRANGEBYSCORE", key, newest, "-inf", "WITHSCORES", "LIMIT", 0, limit)
            pairs = _pairs(self.link.run([KeyCommand(key, words)])[0], key)
            fresh = [(score, user_id) for score, user_id in pairs if user_id not in given]
            for score, user_id in fresh:
                yield -score, user_id
            if len(pairs) < limit:
                return
            last = pairs[-1][0]
            # Users at the last time of a page may go on in the next one.
            newest = repr(last)
            given = {user_id for score, user_id in pairs if score == last}


def _pairs(answer: Any, key: str) -> list[tuple[float, int]]:
    if isinstance(answer, DurableTierUnavailableError):
        raise answer
    if answer is Foreign.VALUE:
        raise DurableTierError(f"something else is stored at {key}; delete it, or use another db")
    return [
        (float(score), int(member)) for member, score in zip(answer[::2], answer[1::2], strict=True)
    ]
