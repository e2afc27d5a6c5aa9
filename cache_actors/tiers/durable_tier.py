"""What the pool needs of a store that outlives its nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from marm.memory import Namespace, UserRows


class DurableTierError(RuntimeError):
    """The durable tier refused, or isn't what it should be."""


class DurableTierUnavailableError(DurableTierError):
    """The durable tier does not answer just now; what was asked may be asked again later."""


@dataclass(frozen=True)
class TierRead:
    """What a durable tier has of a batch of users.

    A user whose ``damaged`` or ``unavailable`` place is set has no rows here: of the first, what
    was stored failed its check; of the second, nothing is known.
    """

    rows: UserRows
    damaged: NDArray[np.bool_]  # [U]
    unavailable: NDArray[np.bool_]  # [U]


@dataclass(frozen=True)
class TierWrite:
    """Which users of a batch are stored now, and the bytes that had to be sent for it."""

    saved: NDArray[np.bool_]  # [U]
    sent_bytes: int


@dataclass(frozen=True)
class TierStats:
    """Counts since the process connected.

    Attributes:
        hits, misses: users asked for that had rows, and that had none.
        read_users, read_bytes, written_users, written_bytes: blocks and bytes moved.
        damaged_blocks: values that failed their check, or that something else had put there.
        forgotten_rows: rows left out because their user was forgotten.
        errors: calls that failed because a server did not answer.
        available: whether every server answered the last time it was asked.
    """

    hits: int = 0
    misses: int = 0
    read_users: int = 0
    read_bytes: int = 0
    written_users: int = 0
    written_bytes: int = 0
    damaged_blocks: int = 0
    forgotten_rows: int = 0
    errors: int = 0
    available: bool = True


class DurableTier(Protocol):
    """Blocks of users' rows, kept by something that survives the loss of a node.

    Rows put are added to what is there, by event: the tier may hold a user's older rows of which a
    shard knows nothing any more.
    """

    def try_put(self, namespace: Namespace, rows: UserRows) -> TierWrite:
        """Add rows to what is stored of their users. Repeating it changes nothing."""
        ...

    def put(self, namespace: Namespace, rows: UserRows) -> TierWrite:
        """`try_put`, raising `DurableTierUnavailableError` unless every user was stored."""
        ...

    def read(self, namespace: Namespace, user_ids: NDArray[np.int64]) -> TierRead:
        """All rows of users, as far as they can be had."""
        ...

    def get(self, namespace: Namespace, user_ids: NDArray[np.int64]) -> UserRows:
        """`read`, raising `DurableTierUnavailableError` unless all users could be asked for."""
        ...

    def namespaces(self) -> list[Namespace]:
        """Namespaces that rows were put of."""
        ...

    def drop(self, namespace: Namespace, buckets: Sequence[int]) -> int:
        """Remove all users of some buckets of a namespace; how many blocks were there."""
        ...

    def delete(self, user_ids: NDArray[np.int64]) -> int:
        """Remove users from all namespaces; how many blocks were there."""
        ...

    def forget(self, user_id: int, until_ms: int) -> int:
        """Remove a user's rows up to and at a time from all namespaces, and refuse them from now
        on; how many rows were removed."""
        ...

    def forgotten(self) -> Mapping[int, int]:
        """Every forgotten user with the time until which its rows are refused."""
        ...

    def scan(self, namespace: Namespace, buckets: Sequence[int]) -> Iterator[NDArray[np.int64]]:
        """Users of some buckets, those with the newest rows first, in small arrays."""
        ...

    def identity(self) -> str:
        """Changes whenever the tier may have lost what it acknowledged."""
        ...

    def synced_identity(self, store_id: str) -> str | None:
        """The `identity` that `set_synced` was last given for a store, if the tier kept it."""
        ...

    def set_synced(self, store_id: str, identity: str) -> None:
        """Note that everything a store had marked as saved is in the tier of this identity."""
        ...

    def stats(self) -> TierStats:
        """Counts since this process connected."""
        ...

    def close(self) -> None:
        """Give the connections back."""
        ...
