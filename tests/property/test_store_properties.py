"""The store on disk behaves exactly like the in-process reference, whatever is done to it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cache_actors.store.row_merge import upsert_runs
from cache_actors.store.lmdb_memory import LmdbMemory
from marm.addressing import user_bucket
from marm.memory import RAW_STEP, InProcessMemory, Namespace, UserRows, upsert_rows

# Nine rows fill a page, so that a few saves already append, split and insert across pages.
LARGE_ROWS = Namespace(depth=2, dim=400, dtype="float16")
USERS = (0, 1, -1, 2**63 - 1, -(2**63), 77)

row_tuples = st.tuples(
    st.sampled_from(USERS),
    st.one_of(st.integers(-3, 40), st.sampled_from([-(2**62), 2**62])),  # timestamp
    st.integers(0, 3),  # event key
    st.integers(0, 2**12 - 1),  # feedback
    st.integers(RAW_STEP, 2),  # written step
)


def make_rows(namespace: Namespace, values: list[tuple[int, int, int, int, int]]):
    rows = np.zeros(len(values), namespace.row_dtype)
    for index, (user, timestamp, key, feedback, step) in enumerate(values):
        rows[index]["timestamp_ms"] = timestamp
        rows[index]["event_key"] = key
        rows[index]["feedback"] = feedback
        rows[index]["written_step"] = step
        rows[index]["item_id"] = hash((user, timestamp, key, index)) % 1000
        rows[index]["memory"] = 0 if step == RAW_STEP else index + 1
    return np.array([value[0] for value in values], np.int64), rows


def assert_same(found: UserRows, expected: UserRows) -> None:
    assert found.offsets.tolist() == expected.offsets.tolist()
    assert found.rows.tobytes() == expected.rows.tobytes()


class StoreMachine(RuleBasedStateMachine):
    """Random saves, fetches and reopenings of one store beside the reference."""

    namespace = LARGE_ROWS

    @initialize(max_rows=st.sampled_from([None, 1, 5, 12, 30]))
    def open(self, max_rows: int | None) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.max_rows = max_rows
        self.reference = InProcessMemory(self.namespace, max_rows)
        self.store = self.open_store()

    def open_store(self) -> LmdbMemory:
        return LmdbMemory(
            self.directory / "store",
            self.namespace,
            map_size_bytes=1 << 16,
            max_rows_per_user=self.max_rows,
        )

    @rule(values=st.lists(row_tuples, max_size=40))
    def save(self, values: list[tuple[int, int, int, int, int]]) -> None:
        user_ids, rows = make_rows(self.namespace, values)
        before = rows.tobytes()
        self.store.save(user_ids, rows).wait()
        assert rows.tobytes() == before
        self.reference.save(user_ids, rows)

    @rule(user=st.sampled_from(USERS), start=st.integers(0, 60), count=st.integers(1, 50))
    def append(self, user: int, start: int, count: int) -> None:
        self.save([(user, start + step, 1, 0, 1) for step in range(count)])

    @rule(
        users=st.lists(st.sampled_from((*USERS, 5)), unique=True),
        n=st.integers(0, 60),
        before=st.one_of(st.none(), st.integers(-4, 120)),
    )
    def fetch(self, users: list[int], n: int, before: int | None) -> None:
        user_ids = np.array(users, np.int64)
        before_ms = None if before is None else before + np.arange(len(users))
        expected = self.reference.fetch(user_ids, n, before_ms)
        assert_same(self.store.fetch(user_ids, n, before_ms), expected)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.open_store()

    @invariant()
    def holds_the_same_rows(self) -> None:
        if not hasattr(self, "store"):
            return
        users = np.array(USERS, np.int64)
        everything = self.reference.fetch(users, 10**6)
        assert_same(self.store.fetch(users, 10**6), everything)
        scanned = {
            user: rows.tobytes()
            for bucket in sorted(set(user_bucket(users).tolist()))
            for user, rows in self.store.scan(bucket)
        }
        expected = {u: everything.of(i).tobytes() for i, u in enumerate(USERS)}
        assert scanned == {user: rows for user, rows in expected.items() if rows}
        stats = self.store.stats()
        assert stats.users == len(scanned)
        if self.max_rows is None:
            assert stats.rows == len(everything.rows)
        else:
            assert len(everything.rows) <= stats.rows

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.directory)


class SmallRowsMachine(StoreMachine):
    """Rows without stored layers: many to a page."""

    namespace = Namespace(depth=0, dim=1)


TestLargeRows = StoreMachine.TestCase
TestLargeRows.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)
TestSmallRows = SmallRowsMachine.TestCase
TestSmallRows.settings = settings(max_examples=15, stateful_step_count=10, deadline=None)


@settings(max_examples=150, deadline=None)
@given(old=st.lists(row_tuples, max_size=12), new=st.lists(row_tuples, max_size=12))
@pytest.mark.parametrize("namespace", [Namespace(), Namespace(depth=0), Namespace(dtype="float32")])
def test_merging_all_users_at_once_equals_merging_one_by_one(
    namespace: Namespace, old: list, new: list
) -> None:
    dtype = namespace.row_dtype
    empty = np.empty(0, dtype)
    stored = []
    for user in USERS:
        _, rows = make_rows(namespace, [value for value in old if value[0] == user])
        stored.append(upsert_rows(empty, rows) if len(rows) else empty)
    user_ids, rows = make_rows(namespace, new)
    run = np.array([USERS.index(user) for user in user_ids.tolist()], np.int64)
    old_run = np.repeat(np.arange(len(USERS)), [len(part) for part in stored])
    merged = upsert_runs(dtype, len(USERS), [part.tobytes() for part in stored], old_run, rows, run)
    for user, part in enumerate(stored):
        mine = rows[run == user]
        expected = upsert_rows(part, mine) if len(mine) else part
        found = merged.rows[merged.starts[user] : merged.starts[user + 1]]
        assert found.tobytes() == expected.tobytes()
