"""Users that asked to be forgotten: their rows up to a time are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_actors.tiers.durable_tier import DurableTierError


def as_until(tombstone: Any) -> int | None:
    """Until when (ms) rows are refused, as Redis gives it."""
    if not tombstone:
        return None
    try:
        return int(tombstone)
    except (TypeError, ValueError):
        raise DurableTierError(
            "something else is stored where forgotten users are noted; give the pool its own db"
        ) from None


def not_forgotten(rows: NDArray[np.void], until_ms: int | None) -> NDArray[np.void]:
    """The rows later than ``until_ms``."""
    return rows if until_ms is None else rows[rows["timestamp_ms"] > until_ms]
