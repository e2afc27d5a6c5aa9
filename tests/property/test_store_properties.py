"""Merging and reading many users at once equals doing it one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from stored_rows import INT64

from cache_actors.store.records import CHECK, WORD_BYTES, Record, RecordBatch, pack_extent
from cache_actors.store.row_merge import expand_runs, upsert_runs
from marm.memory import RAW_STEP, Namespace, upsert_rows

USERS = (0, 1, -1, INT64.max, INT64.min, 77)

row_tuples = st.tuples(
    st.sampled_from(USERS),
    st.one_of(st.integers(-3, 40), st.sampled_from([INT64.min, INT64.max])),  # timestamp
    st.integers(0, 3),  # event key
    st.integers(0, 2**12 - 1),  # feedback
    st.integers(RAW_STEP, 2),  # written step
)
int64s = st.integers(INT64.min, INT64.max)
extents = st.builds(
    pack_extent, st.integers(0, 2**40 - 1), st.integers(0, 255), st.integers(0, 2**16 - 1)
)
u32s = st.integers(0, 2**32 - 1)
records = st.builds(
    Record,
    newest_ms=int64s,
    newest_key=st.integers(0, 2**64 - 1),
    version=u32s,
    written_s=u32s,
    evicted_rows=u32s,
    flags=u32s,
    extents=st.lists(extents, max_size=9).map(tuple),
)


def make_rows(namespace: Namespace, values: list) -> tuple[NDArray[np.int64], NDArray[np.void]]:
    rows = np.zeros(len(values), namespace.row_dtype)
    for index, (_, timestamp, key, feedback, step) in enumerate(values):
        rows[index]["timestamp_ms"] = timestamp
        rows[index]["event_key"] = key
        rows[index]["feedback"] = feedback
        rows[index]["written_step"] = step
        rows[index]["item_id"] = index
        rows[index]["memory"] = 0 if step == RAW_STEP else index + 1
    return np.array([value[0] for value in values], np.int64), rows


@settings(max_examples=100, deadline=None)
@given(old=st.lists(row_tuples, max_size=12), new=st.lists(row_tuples, max_size=12))
@pytest.mark.parametrize("namespace", [Namespace(), Namespace(depth=0), Namespace(dtype="float32")])
def test_merging_all_users_at_once_equals_merging_one_by_one(
    namespace: Namespace, old: list, new: list
) -> None:
    empty = np.empty(0, namespace.row_dtype)
    stored = []
    for user in USERS:
        _, rows = make_rows(namespace, [value for value in old if value[0] == user])
        stored.append(upsert_rows(empty, rows) if len(rows) else empty)
    user_ids, rows = make_rows(namespace, new)
    run = np.array([USERS.index(user) for user in user_ids.tolist()], np.int64)
    old_run = np.repeat(np.arange(len(USERS)), [len(part) for part in stored])
    merged = upsert_runs(len(USERS), np.concatenate(stored), old_run, rows, run)
    for user, part in enumerate(stored):
        mine = rows[run == user]
        expected = upsert_rows(part, mine) if len(mine) else part
        found = merged.rows[merged.starts[user] : merged.starts[user + 1]]
        assert found.tobytes() == expected.tobytes()
    assert merged.owner.tolist() == np.repeat(np.arange(6), np.diff(merged.starts)).tolist()


@settings(max_examples=200, deadline=None)
@given(stored=st.lists(st.tuples(int64s, st.one_of(st.none(), records)), max_size=8))
def test_columns_of_records_equal_the_records(stored: list[tuple[int, Record | None]]) -> None:
    user_ids = np.array([user for user, _ in stored], np.int64)
    values = [None if record is None else record.pack(user) for user, record in stored]
    batch = RecordBatch.of(values, user_ids)
    assert not batch.damaged.any()
    for index, (user, record) in enumerate(stored):
        assert batch.record(index) == record
        assert batch.absent[index] == (record is None)
        data = values[index]
        if record is not None and data is not None:
            assert Record.unpack(data, user) == record
            assert batch.newest_ms[index] == record.newest_ms
            assert batch.num_extents[index] == len(record.extents)
            words = np.frombuffer(data, np.uint64)
            total = sum(words.tolist()) - CHECK - user
            assert total % (1 << 8 * WORD_BYTES) == 0


@settings(max_examples=200, deadline=None)
@given(
    stored=st.lists(st.tuples(int64s, records), min_size=1, max_size=5),
    index=st.integers(0, 4),
    bit=st.integers(0, 10**6),
)
def test_one_flipped_bit_damages_one_record(
    stored: list[tuple[int, Record]], index: int, bit: int
) -> None:
    index %= len(stored)
    user_ids = np.array([user for user, _ in stored], np.int64)
    values = [bytearray(record.pack(user)) for user, record in stored]
    bit %= 8 * len(values[index])
    values[index][bit // 8] ^= 1 << bit % 8
    batch = RecordBatch.of([bytes(value) for value in values], user_ids)
    assert np.flatnonzero(batch.damaged).tolist() == [index]
    for other, (_, record) in enumerate(stored):
        assert batch.record(other) == (None if other == index else record)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 9)), max_size=12))
def test_runs_expand_to_their_numbers(runs: list[tuple[int, int]]) -> None:
    start, count = np.array(runs, np.int64).reshape(-1, 2).T
    expected = [number for first, size in runs for number in range(first, first + size)]
    assert expand_runs(start, count).tolist() == expected
