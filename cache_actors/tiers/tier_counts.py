"""Counters of a tier that several threads use."""

from __future__ import annotations

import threading
from dataclasses import asdict, replace

from cache_actors.tiers.durable_tier import TierStats


class TierCounts:
    """A `TierStats` that grows."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats = TierStats()

    def add(self, **amounts: int) -> None:
        """Add to counters, by their names."""
        with self._lock:
            now = asdict(self._stats)
            self._stats = replace(
                self._stats, **{name: now[name] + amount for name, amount in amounts.items()}
            )

    def stats(self, available: bool) -> TierStats:
        """The counters now."""
        with self._lock:
            return replace(self._stats, available=available)
