"""What can go wrong between a client and the shards of a pool."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.lookup import Lookup


class MemoryUnavailable(RuntimeError):  # noqa: N818
    """A shard did not answer in time, or the pool does not run."""


class NotLeaderError(MemoryUnavailable):
    """Another replica of the shard takes the saves by now."""


class PartlyUnavailable(MemoryUnavailable):
    """Some users of a batch could not be read; ``found`` is what is known of all the others."""

    def __init__(self, message: str, found: Lookup, missing: NDArray[np.bool_]) -> None:
        """``missing [U]`` tells which users, who have no rows in ``found``."""
        super().__init__(message)
        self.found = found
        self.missing = missing

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return PartlyUnavailable, (str(self), self.found, self.missing)


class HandoverLostError(RuntimeError):
    """A copy of buckets was broken off; it can be begun again."""
