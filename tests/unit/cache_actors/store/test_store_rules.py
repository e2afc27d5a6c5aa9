"""What is kept beside the rows: limits, rules for readers, counters, and who was used when."""

from __future__ import annotations

import numpy as np
import pytest
from stored_rows import OpenStore, series

from cache_actors.store.counters import NamespaceCounters
from cache_actors.store.limits import MIN_BYTES, UNLIMITED, StoreLimits
from cache_actors.store.recency import Recency
from cache_actors.store.rules import ReadRules
from marm.memory import Namespace

NAMESPACE = Namespace()


@pytest.mark.parametrize("owned", [[], [0], [3, 77, 255], list(range(256))])
@pytest.mark.parametrize(("max_rows", "ttl_s", "number"), [(None, None, 0), (1, 2**31, 9999)])
def test_rules_come_back(
    owned: list[int], max_rows: int | None, ttl_s: int | None, number: int
) -> None:
    mask = np.zeros(256, np.bool_)
    mask[owned] = True
    rules = ReadRules.unpack(ReadRules(mask, max_rows, ttl_s, number).pack())
    assert np.flatnonzero(rules.owned).tolist() == owned
    assert (rules.max_rows_per_user, rules.ttl_s, rules.file_number) == (max_rows, ttl_s, number)
    assert rules.owns_all == (len(owned) == 256)


def test_counters_come_back() -> None:
    counters = NamespaceCounters(1, 2, 3, -1, 5, 6, 7, 8, 9, 10, 11)
    assert NamespaceCounters.unpack(counters.pack()) == counters
    assert NamespaceCounters.unpack(None) == NamespaceCounters()


def test_limits_without_bounds_and_quotas_by_name() -> None:
    assert StoreLimits() == UNLIMITED
    limits = StoreLimits(max_bytes=MIN_BYTES, namespace_bytes=(("a", MIN_BYTES), ("b", 2**40)))
    assert (limits.quota("a"), limits.quota("b"), limits.quota("c")) == (MIN_BYTES, 2**40, None)


def test_the_coldest_users_come_first() -> None:
    recency = Recency([5, 3, 4])
    recency.add([6, 3])
    recency.touch([5, 99])
    assert len(recency) == 4
    assert recency.coldest(10) == [4, 6, 3, 5]
    recency.remove([6, 99])
    assert recency.coldest(2) == [4, 3]
    assert Recency().coldest(3) == []


def test_what_is_stored_is_counted(open_store: OpenStore) -> None:
    store = open_store()
    store.save(NAMESPACE, *series(NAMESPACE, 30, 200, step=7))
    held = store.open(NAMESPACE)
    stats = held.stats()
    payload = 6000 * NAMESPACE.stored_dtype.itemsize
    assert (stats.users, stats.rows) == (30, 6000)
    assert stats.counters.newest_step == 7
    assert stats.counters.saves == 1
    assert payload < stats.stored_bytes < 1.4 * payload
    assert stats.stored_bytes <= stats.file_bytes + store.stats().index_bytes
    store.save(NAMESPACE, *series(NAMESPACE, 30, 200, step=7))  # the same again
    again = held.stats()
    assert (again.users, again.rows) == (30, 6000)
    assert again.counters.saves == 2
    store.drop(NAMESPACE)
    assert held.stats().counters == NamespaceCounters()
