"""What shards and clients report to Ray's metrics, by shard and namespace."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from ray.util.metrics import Counter, Gauge, Histogram

from cache_actors.pool.client_stats import FetchCounts, ReadCounts
from cache_actors.store.namespace_store import StoreStats
from marm.memory import RAW_STEP, Namespace

_LATENCY_MS = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000]
_SHARD_TAGS = ("shard", "replica", "namespace")


class ShardMetrics:
    """Metrics of one replica of a shard."""

    def __init__(self, shard: int, replica: int) -> None:
        self._tags = {"shard": str(shard), "replica": str(replica)}
        self._read_ms = _latency("read", "Lookups that other nodes asked this shard for")
        self._write_ms = _latency("write", "Saves, until they were acknowledged")
        self._gauges = {
            name: Gauge(f"marm_memory_{name}", description, _SHARD_TAGS)
            for name, description in _GAUGES.items()
        }

    @contextmanager
    def timed_read(self, namespace: Namespace) -> Iterator[None]:
        """Time a lookup."""
        began = time.perf_counter()
        yield
        self._read_ms.observe((time.perf_counter() - began) * 1000, self._of(namespace))

    @contextmanager
    def timed_write(self, namespace: Namespace) -> Iterator[None]:
        """Time a save."""
        began = time.perf_counter()
        yield
        self._write_ms.observe((time.perf_counter() - began) * 1000, self._of(namespace))

    def publish(self, namespace: Namespace, held: StoreStats, backlog_users: int) -> None:
        """Report what the shard holds of a namespace, and what the durable tier lacks of it."""
        counters = held.counters
        values = {
            "users": counters.users,
            "rows": counters.rows,
            "stored_bytes": held.stored_bytes,
            "file_bytes": held.file_bytes,
            "newest_step": counters.newest_step,
            "evicted_users": counters.evicted_users,
            "evictions": counters.evictions,
            "evicted_unsaved": counters.evicted_unsaved,
            "expired_users": counters.expired,
            "damaged_rows": counters.damaged_rows,
            "forgotten_rows": counters.forgotten_rows,
            "backlog_users": backlog_users,
        }
        for name, value in values.items():
            self._gauges[name].set(value, self._of(namespace))

    def _of(self, namespace: Namespace) -> dict[str, str]:
        return {**self._tags, "namespace": namespace.name}


_GAUGES = {
    "users": "Users with rows",
    "rows": "Rows on disk",
    "stored_bytes": "Bytes in use by rows and index",
    "file_bytes": "Bytes of the row files",
    "newest_step": "Newest training step that wrote a row",
    "evicted_users": "Users of whom rows were evicted and not brought back",
    "evictions": "Users evicted since the store was made",
    "evicted_unsaved": "Users evicted that the durable tier did not have",
    "expired_users": "Users removed for their age since the store was made",
    "damaged_rows": "Rows dropped because they failed their check",
    "forgotten_rows": "Rows removed or refused because their user was forgotten",
    "backlog_users": "Users whose newest change the durable tier does not have",
}


class ClientMetrics:
    """Metrics of one client; what it counts is sent now and then, for reads must stay cheap."""

    def __init__(self, namespace: Namespace) -> None:
        self._tags = {"namespace": namespace.name}
        self._read_ms = Histogram(
            "marm_memory_client_read_ms", "Fetches of clients", _LATENCY_MS, ("namespace",)
        )
        self._users = Counter(
            "marm_memory_client_users",
            "Users that clients looked up: where, and whether they had rows",
            ("shard", "namespace", "tier", "outcome"),
        )
        self._gauges = {
            name: Gauge(f"marm_memory_client_{name}", description, ("namespace",))
            for name, description in _CLIENT_GAUGES.items()
        }
        self._reads_s: list[float] = []
        self._seen: NDArray[np.void] | None = None
        self._sent: dict[tuple[int, str], ReadCounts] = {}

    def read(self, seconds: float, rows: NDArray[np.void]) -> None:
        """Note a fetch."""
        self._reads_s.append(seconds)
        self._seen = rows

    def publish(
        self,
        fetched: FetchCounts,
        pending_saves: int,
        newest_step: int,
        reads: Mapping[tuple[int, str], ReadCounts],
    ) -> None:
        """Send what was noted; ``reads`` counts since the client was made, by shard and tier."""
        durations, self._reads_s = self._reads_s, []
        for seconds in durations[-_MAX_OBSERVATIONS:]:
            self._read_ms.observe(seconds * 1000, self._tags)
        self._gauges["hit_rate"].set(fetched.hit_rate, self._tags)
        self._gauges["pending_saves"].set(pending_saves, self._tags)
        self._publish_staleness(newest_step)
        for (shard, tier), now in reads.items():
            before = self._sent.get((shard, tier), ReadCounts())
            self._sent[shard, tier] = now
            tags = {**self._tags, "shard": str(shard), "tier": tier}
            hits = now.found - before.found
            for outcome, count in (("hit", hits), ("miss", now.asked - before.asked - hits)):
                if count > 0:
                    self._users.inc(count, {**tags, "outcome": outcome})

    def _publish_staleness(self, newest_step: int) -> None:
        """How old the memorised rows of the latest fetch are: a sample."""
        rows, self._seen = self._seen, None
        if rows is None:
            return
        memorised = rows[rows["written_step"] != RAW_STEP]
        if len(memorised):
            behind = newest_step - memorised["written_step"].astype(np.int64)
            self._gauges["staleness_steps"].set(float(behind.mean()), self._tags)
            age_s = time.time() - float(memorised["written_s"].mean())
            self._gauges["staleness_seconds"].set(max(0.0, age_s), self._tags)


_MAX_OBSERVATIONS = 1000

_CLIENT_GAUGES = {
    "hit_rate": "Share of fetched rows that training had computed, since the client was made",
    "pending_saves": "Saves that are not acknowledged yet",
    "staleness_steps": "Training steps that fetched rows are behind, on average",
    "staleness_seconds": "Age of fetched rows, on average",
}


def _latency(what: str, description: str) -> Histogram:
    return Histogram(f"marm_memory_{what}_ms", description, _LATENCY_MS, _SHARD_TAGS)
