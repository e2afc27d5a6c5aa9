"""Names of what a pool keeps in Redis.

    marm:<pool>:<namespace>:<bucket>:{<user>}   a user's block of rows
    marm:<pool>:forgotten:{<user>}              until when (ms) the user's rows are refused
    marm:<pool>:pending:{<user>}:<writer>       a block that is about to take another one's place
    marm:<pool>:<namespace>:<bucket>:users      sorted set of a bucket's users by newest row
    marm:<pool>:forgotten                       hash of all forgotten users
    marm:<pool>:namespaces                      hash of namespace names and their fields as JSON
    marm:<pool>:synced                          hash of shard stores that are wholly saved

The braces make a Redis Cluster keep everything of one user on one node, where one script can check
and change it.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from marm.addressing import user_bucket


@dataclass(frozen=True)
class RedisKeys:
    """Key names of one pool. Any text will do as its name."""

    pool_name: str

    def __post_init__(self) -> None:
        if not self.pool_name:
            raise ValueError("a pool needs a name to keep its rows in Redis under, got none")

    @property
    def _prefix(self) -> str:
        return f"marm:{quote(self.pool_name, safe='')}"

    @property
    def forgotten(self) -> str:
        """Hash of all forgotten users."""
        return f"{self._prefix}:forgotten"

    @property
    def namespaces(self) -> str:
        """Hash of the namespaces that have blocks."""
        return f"{self._prefix}:namespaces"

    @property
    def synced(self) -> str:
        """Hash of stores whose saved rows are all here."""
        return f"{self._prefix}:synced"

    def tombstone(self, user_id: int) -> str:
        """Until when one user's rows are refused."""
        return f"{self._prefix}:forgotten:{{{user_id}}}"

    def pending(self, user_id: int, writer: str) -> str:
        """A block of one user that one writer is about to swap in."""
        return f"{self._prefix}:pending:{{{user_id}}}:{writer}"

    def blocks(self, namespace_name: str, user_ids: NDArray[np.int64]) -> list[str]:
        """Where the blocks of users are."""
        prefix = f"{self._prefix}:{namespace_name}"
        buckets = user_bucket(user_ids).tolist()
        return [
            f"{prefix}:{bucket}:{{{user}}}"
            for bucket, user in zip(buckets, user_ids.tolist(), strict=True)
        ]

    def users(self, namespace_name: str, bucket: int) -> str:
        """The index of a bucket's users."""
        return f"{self._prefix}:{namespace_name}:{bucket}:users"

    def indices_of(self, namespace_name: str, user_ids: NDArray[np.int64]) -> list[str]:
        """The index that each of some users belongs in."""
        return [self.users(namespace_name, bucket) for bucket in user_bucket(user_ids).tolist()]
