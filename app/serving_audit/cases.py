"""Which users, moments and items an audit looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marm.addressing import NUM_BUCKETS
from marm.items import ItemCatalog, ItemFeatures
from marm.memory import UserRows

UsersOfBucket = Callable[[int], NDArray[np.int64]]
"""Users of whom a bucket of the memory holds rows."""


@dataclass(frozen=True)
class AuditCase:
    """One user at one moment."""

    user_id: int
    now_ms: int
    context_id: int
    items: ItemFeatures


def sample_users(users_of: UsersOfBucket, count: int, rng: np.random.Generator) -> list[int]:
    """At most ``count`` users with rows, from buckets in random order."""
    found: list[int] = []
    for bucket in rng.permutation(NUM_BUCKETS).tolist():
        if len(found) >= count:
            break
        users = np.sort(users_of(bucket))
        found += rng.permutation(users).tolist()[: count - len(found)]
    return found


def cases_of(
    rows: UserRows, catalog: ItemCatalog, num_items: int, rng: np.random.Generator
) -> Iterator[AuditCase]:
    """A user now, and as of the middle of his history: the second finds rows of the future in the
    memory, which must not be seen. Items are half his own and half anybody's."""
    (user_id,) = rows.user_ids.tolist()
    stamps = rows.rows["timestamp_ms"]
    if not len(stamps):
        return
    moments = {int(stamps[-1]) + 1, int(stamps[len(stamps) // 2])}
    for now_ms in sorted(moments):
        row = rows.rows[rng.integers(len(stamps))]
        items = _some_items(rows, catalog, num_items, rng)
        yield AuditCase(user_id, now_ms, int(row["context_id"]), items)


def _some_items(
    rows: UserRows, catalog: ItemCatalog, num_items: int, rng: np.random.Generator
) -> ItemFeatures:
    own = np.unique(rows.rows["item_id"])
    own = rng.permutation(own)[: max(1, num_items // 2)]
    others = np.setdiff1d(catalog.items.item_id, own)
    others = rng.permutation(others)[: num_items - len(own)]
    return catalog.lookup(np.concatenate([own, others]))
