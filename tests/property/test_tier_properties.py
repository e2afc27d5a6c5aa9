"""The durable tier against a dict of rows, whatever is put, repeated, damaged and forgotten."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis_servers import TestServer, redis_server
from tier_rows import START_MS

from cache_actors.store.row_formats import as_read
from cache_actors.tiers.redis_tier import RedisTier
from marm.addressing import NUM_BUCKETS
from marm.memory import RAW_STEP, Namespace, UserRows, upsert_rows

MAX_ROWS = 12
POOL_NUMBERS = itertools.count()

EVENT = st.tuples(
    st.integers(0, 20),  # which event
    st.sampled_from([RAW_STEP, 1, 2, 3]),
    st.integers(0, 3),  # feedback
)
PUT = st.tuples(
    st.just("put"),
    st.dictionaries(st.integers(0, 3), st.lists(EVENT, min_size=1, max_size=8), min_size=1),
)
FORGET = st.tuples(st.just("forget"), st.tuples(st.integers(0, 3), st.integers(-1, 20)))
DELETE = st.tuples(st.just("delete"), st.sets(st.integers(0, 3), max_size=2))
CHANGES = st.lists(st.one_of(PUT, PUT, PUT, FORGET, DELETE), max_size=12)


@pytest.fixture(scope="module")
def server() -> Iterator[TestServer]:
    with redis_server() as server:
        yield server


def rows_of(namespace: Namespace, events: list[tuple[int, int, int]]) -> np.ndarray:
    """One row per event, each once, oldest first, as a store holds them."""
    latest = {event: (event, step, feedback) for event, step, feedback in events}
    rows = np.zeros(len(latest), namespace.row_dtype)
    for row, (event, step, feedback) in zip(rows, sorted(latest.values()), strict=True):
        row["event_key"] = event
        row["timestamp_ms"] = START_MS + event // 2
        row["feedback"] = feedback
        row["written_step"] = step
        if step != RAW_STEP:
            row["memory"] = step + event / 8
    return as_read(namespace, rows)


def packed(namespace: Namespace, by_user: dict[int, np.ndarray]) -> UserRows:
    counts = [len(rows) for rows in by_user.values()]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    rows = np.concatenate([np.empty(0, namespace.row_dtype), *by_user.values()])
    return UserRows(np.array(list(by_user), np.int64), offsets, rows)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=CHANGES)
def test_the_tier_is_a_dict_of_upserted_rows(server: TestServer, dtype: str, changes: list) -> None:
    namespace = Namespace(depth=1, dim=4, dtype=dtype)
    tier = RedisTier.connect(server.url, f"pool-{next(POOL_NUMBERS)}", max_rows_per_user=MAX_ROWS)
    expected = {user: np.empty(0, namespace.row_dtype) for user in range(4)}
    forgotten: dict[int, int] = {}
    for kind, what in changes:
        if kind == "put":
            put = {user: rows_of(namespace, events) for user, events in what.items()}
            for _ in range(2):  # the second time changes nothing
                tier.put(namespace, packed(namespace, put))
            for user, rows in put.items():
                kept = rows[rows["timestamp_ms"] > forgotten.get(user, 0)]
                if len(kept):
                    expected[user] = upsert_rows(expected[user], kept)[-MAX_ROWS:]
        elif kind == "forget":
            user, event = what
            until_ms = START_MS + event
            before = expected[user]
            expected[user] = before[before["timestamp_ms"] > until_ms]
            assert tier.forget(user, until_ms) == len(before) - len(expected[user])
            forgotten[user] = max(until_ms, forgotten.get(user, 0))
        else:
            tier.delete(np.array(sorted(what), np.int64))
            for user in what:
                expected[user] = expected[user][:0]
        found = tier.get(namespace, np.arange(4))
        assert found.counts.tolist() == [len(rows) for rows in expected.values()]
        assert found.rows.tobytes() == packed(namespace, expected).rows.tobytes()
    assert tier.forgotten() == forgotten
    scanned = list(itertools.chain(*tier.scan(namespace, range(NUM_BUCKETS))))
    assert sorted(scanned) == [user for user, rows in expected.items() if len(rows)]
    tier.close()
