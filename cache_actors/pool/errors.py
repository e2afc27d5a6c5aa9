"""What can go wrong between a client and the shards of a pool."""

from __future__ import annotations


class MemoryUnavailable(RuntimeError):  # noqa: N818
    """A shard did not answer in time, or the pool does not run."""


class NotLeaderError(MemoryUnavailable):
    """Another replica of the shard takes the saves by now."""


class HandoverLostError(RuntimeError):
    """A copy of buckets was broken off; it can be begun again."""
