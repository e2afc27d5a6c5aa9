"""Which items may be returned: seen, blocked and excluded ones may not, allow lists are exclusive.

Lists that stand for a while (a variant's live settings, tens of thousands of ids) are kept apart
from those of one request, so that whoever translates ids can keep the result for the former.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64] | Sequence[int]


@dataclass(frozen=True, eq=False)
class ItemLists:
    """A block list and possibly an allow list; ids ascend and occur once.

    Attributes:
        blocked: items that are never returned.
        allowed: only these may be returned; None allows every item.
    """

    blocked: NDArray[np.int64]
    allowed: NDArray[np.int64] | None = None

    @staticmethod
    def of(blocked: Sequence[Ids] = (), allowed: Ids | None = None) -> ItemLists:
        """From any number of lists of blocked items, in any order."""
        parts = [np.asarray(part, np.int64) for part in blocked if len(part)]
        return ItemLists(
            blocked=np.unique(np.concatenate([np.empty(0, np.int64), *parts])),
            allowed=None if allowed is None else np.unique(np.asarray(allowed, np.int64)),
        )

    def joined(self, other: ItemLists) -> ItemLists:
        """The lists that let through what both do."""
        allowed = self.allowed if other.allowed is None else other.allowed
        if self.allowed is not None and other.allowed is not None:
            allowed = np.intersect1d(self.allowed, other.allowed, assume_unique=True)
        return ItemLists(union(self.blocked, other.blocked), allowed)


NO_LISTS = ItemLists.of()
"""Everything may be returned."""


@dataclass(frozen=True, eq=False)
class ItemFilter:
    """What both the standing lists and those of the request let through."""

    standing: ItemLists = NO_LISTS
    request: ItemLists = NO_LISTS

    @property
    def all_lists(self) -> tuple[ItemLists, ItemLists]:
        """Both."""
        return self.standing, self.request


EVERY_ITEM = ItemFilter()
"""The filter that lets everything through."""


@dataclass(frozen=True, eq=False)
class Permitted:
    """A filter in terms of the positions of a table of items.

    Attributes:
        only: the permitted positions, ascending, where there is an allow list; None without one.
        blocked: without an allow list, the positions that are not permitted, ascending.
    """

    only: NDArray[np.int64] | None
    blocked: NDArray[np.int64]

    def count(self, num_items: int) -> int:
        """How many of a table of ``num_items`` are permitted."""
        return num_items - len(self.blocked) if self.only is None else len(self.only)

    def positions(self, num_items: int) -> NDArray[np.int64]:
        """All permitted positions of a table of ``num_items``, ascending."""
        return np.flatnonzero(self.mask(num_items)) if self.only is None else self.only

    def mask(self, num_items: int) -> NDArray[np.bool_]:
        """Which positions of a table of ``num_items`` are permitted, ``[num_items]``."""
        mask = np.full(num_items, self.only is None, np.bool_)
        mask[self.blocked] = False
        if self.only is not None:
            mask[self.only] = True
        return mask


class ItemPositions:
    """Where the items of a table stand, by id; each id occurs once in the table."""

    def __init__(self, item_ids: NDArray[np.int64]) -> None:
        self._order = np.argsort(item_ids, kind="stable")
        self._sorted = item_ids[self._order]
        self._standing: tuple[ItemLists, Permitted] | None = None

    def __len__(self) -> int:
        return len(self._sorted)

    def find(self, item_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of those of ``item_ids`` that the table has, ascending."""
        if not len(self._sorted) or not len(item_ids):
            return np.empty(0, np.int64)
        at = np.minimum(np.searchsorted(self._sorted, item_ids), len(self._sorted) - 1)
        return np.sort(self._order[at[self._sorted[at] == item_ids]])

    def permitted(self, item_filter: ItemFilter) -> Permitted:
        """What ``item_filter`` means for this table."""
        standing, request = self._translated(item_filter)
        blocked = union(standing.blocked, request.blocked)
        if standing.only is None and request.only is None:
            return Permitted(None, blocked)
        if standing.only is None or request.only is None:
            only = request.only if standing.only is None else standing.only
            assert only is not None
        else:
            only = np.intersect1d(standing.only, request.only, assume_unique=True)
        return Permitted(without(only, blocked), np.empty(0, np.int64))

    def _translated(self, item_filter: ItemFilter) -> tuple[Permitted, Permitted]:
        known = self._standing  # one read: another request may replace it
        if known is None or known[0] is not item_filter.standing:
            known = (item_filter.standing, self._translate(item_filter.standing))
            self._standing = known
        return known[1], self._translate(item_filter.request)

    def _translate(self, lists: ItemLists) -> Permitted:
        only = None if lists.allowed is None else self.find(lists.allowed)
        return Permitted(only, self.find(lists.blocked))


def union(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ascending values of two ascending arrays; without work when either is empty."""
    if not len(one) or not len(other):
        return other if not len(one) else one
    return np.union1d(one, other)


def without(values: NDArray[np.int64], removed: NDArray[np.int64]) -> NDArray[np.int64]:
    """``values`` that are not in ``removed``, which ascends; their order is kept."""
    return values[~is_in(values, removed)]


def is_in(values: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which ``values`` (any shape) are in ``wanted``, which ascends."""
    if not len(wanted):
        return np.zeros(values.shape, np.bool_)
    at = np.minimum(np.searchsorted(wanted, values), len(wanted) - 1)
    found: NDArray[np.bool_] = wanted[at] == values
    return found
