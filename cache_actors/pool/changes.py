"""What can change in a shard, as data: to be applied to its store, and to those that follow it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.shard_store import COLD_MARK, ShardStore
from marm.addressing import user_bucket
from marm.memory import Namespace, UserRows


@dataclass(frozen=True)
class RowsSaved:
    """Rows were upserted."""

    namespace: Namespace
    user_ids: NDArray[np.int64]
    rows: NDArray[np.void]

    def apply(self, store: ShardStore) -> None:
        """Make the change."""
        store.save(self.namespace, self.user_ids, self.rows)

    def within(self, buckets: NDArray[np.bool_]) -> RowsSaved | None:
        """The part of the change that concerns ``buckets [256]``."""
        inside = buckets[user_bucket(self.user_ids)]
        if inside.all():
            return self
        if not inside.any():
            return None
        opaque = self.rows.view(np.dtype((np.void, self.rows.dtype.itemsize)))
        return RowsSaved(
            self.namespace, self.user_ids[inside], opaque[inside].view(self.rows.dtype)
        )


@dataclass(frozen=True)
class RowsRestored:
    """Rows came from elsewhere, and what was stored already wins."""

    namespace: Namespace
    rows: UserRows

    def apply(self, store: ShardStore) -> None:
        """Make the change."""
        store.restore(self.namespace, self.rows)

    def within(self, buckets: NDArray[np.bool_]) -> RowsRestored | None:
        """The part of the change that concerns ``buckets [256]``."""
        inside = np.flatnonzero(buckets[user_bucket(self.rows.user_ids)])
        if not len(inside):
            return None
        return RowsRestored(self.namespace, take_users(self.rows, inside))


@dataclass(frozen=True)
class UsersForgotten:
    """Rows of users up to a time each were removed for good."""

    until_ms: dict[int, int]

    def apply(self, store: ShardStore) -> None:
        """Make the change."""
        for user_id, until_ms in self.until_ms.items():
            store.forget(user_id, until_ms)

    def within(self, buckets: NDArray[np.bool_]) -> UsersForgotten | None:
        """The part of the change that concerns ``buckets [256]``."""
        inside = {u: t for u, t in self.until_ms.items() if buckets[user_bucket(u)[0]]}
        return UsersForgotten(inside) if inside else None


@dataclass(frozen=True)
class BucketsCleared:
    """Users of some buckets were removed, and the buckets given up."""

    buckets: NDArray[np.int64]

    def apply(self, store: ShardStore) -> None:
        """Make the change."""
        store.disown(self.buckets.tolist())
        for bucket in self.buckets.tolist():
            store.delete_bucket(bucket)

    def within(self, buckets: NDArray[np.bool_]) -> None:
        """Ownership is the shard's own matter."""
        return


@dataclass(frozen=True)
class BucketsOwned:
    """The shard owns more buckets, or (``owned`` false) fewer."""

    buckets: NDArray[np.int64]
    owned: bool

    def apply(self, store: ShardStore) -> None:
        """Make the change."""
        if self.owned:
            store.own(self.buckets.tolist())
        else:
            store.disown(self.buckets.tolist())

    def within(self, buckets: NDArray[np.bool_]) -> None:
        """Ownership is the shard's own matter."""
        return


@dataclass(frozen=True)
class LeftToTier:
    """The durable tier has users that are absent from the store."""

    def apply(self, store: ShardStore) -> None:
        """Make the change."""
        (store.directory / COLD_MARK).touch()

    def within(self, buckets: NDArray[np.bool_]) -> None:
        """The change is the store's own matter."""
        return


@dataclass(frozen=True)
class NamespaceOpened:
    """A namespace exists."""

    namespace: Namespace

    def apply(self, store: ShardStore) -> None:
        """Make the change."""
        store.open(self.namespace)

    def within(self, buckets: NDArray[np.bool_]) -> NamespaceOpened:
        """The change concerns every bucket."""
        return self


@dataclass(frozen=True)
class NamespaceDropped:
    """A namespace and its rows are gone."""

    namespace: Namespace

    def apply(self, store: ShardStore) -> None:
        """Make the change."""
        store.drop(self.namespace)

    def within(self, buckets: NDArray[np.bool_]) -> NamespaceDropped:
        """The change concerns every bucket."""
        return self


Change = (
    RowsSaved
    | RowsRestored
    | UsersForgotten
    | BucketsCleared
    | BucketsOwned
    | LeftToTier
    | NamespaceOpened
    | NamespaceDropped
)


def take_users(rows: UserRows, positions: NDArray[np.int64]) -> UserRows:
    """The users at ``positions``, in that order."""
    if len(positions) == len(rows.user_ids) and (np.diff(positions) == 1).all():
        return rows
    counts = rows.counts[positions]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    index = np.repeat(rows.offsets[positions] - offsets[:-1], counts) + np.arange(offsets[-1])
    return UserRows(rows.user_ids[positions], offsets, rows.rows[index])
