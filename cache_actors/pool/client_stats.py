"""What a client tells of a pool and of what it fetched."""

from __future__ import annotations

from dataclasses import dataclass

from cache_actors.store.namespace_store import StoreStats


@dataclass(frozen=True)
class ReadCounts:
    """Users that were looked up in one way, and those of them that had rows there."""

    asked: int = 0
    found: int = 0


@dataclass(frozen=True)
class FetchCounts:
    """What a client has fetched since it was made.

    Attributes:
        unavailable_users: users whose shard could not be read at all.
        memorised_rows: rows that training had computed, and recently enough for this reader.
        stale_rows: rows that it had computed too long ago; they count as not computed.
        recalled_users: users whose rows had to be brought back from the durable tier.
        damaged_users: users of whom stored rows failed their check.
    """

    users: int = 0
    unavailable_users: int = 0
    rows: int = 0
    memorised_rows: int = 0
    stale_rows: int = 0
    recalled_users: int = 0
    damaged_users: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of fetched rows that training had computed; 0 before the first row."""
        return self.memorised_rows / self.rows if self.rows else 0.0


@dataclass(frozen=True)
class ShardStats:
    """What one shard holds of a namespace; ``held`` is None while it does not answer."""

    shard: int
    is_local: bool
    held: StoreStats | None


@dataclass(frozen=True)
class MemoryStats:
    """What a pool holds of a namespace, and what this client fetched of it."""

    shards: tuple[ShardStats, ...]
    fetched: FetchCounts

    @property
    def users(self) -> int:
        """Users with rows on the shards that answered."""
        return sum(shard.held.users for shard in self.shards if shard.held)

    @property
    def rows(self) -> int:
        """Rows on the shards that answered."""
        return sum(shard.held.rows for shard in self.shards if shard.held)

    @property
    def stored_bytes(self) -> int:
        """Bytes in use on the shards that answered."""
        return sum(shard.held.stored_bytes for shard in self.shards if shard.held)

    @property
    def hit_rate(self) -> float:
        """See `FetchCounts.hit_rate`."""
        return self.fetched.hit_rate
