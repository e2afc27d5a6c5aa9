"""Index records: what is packed comes back, and damage is seen."""

from __future__ import annotations

import numpy as np
import pytest
from stored_rows import INT64

from cache_actors.store.records import (
    HEAD_BYTES,
    KEY_BYTES,
    Flag,
    Record,
    RecordBatch,
    extent_class,
    extent_count,
    extent_start,
    pack_extent,
    record_key,
    record_keys,
    record_words,
    user_of_key,
    users_of_keys,
)
from marm.addressing import user_bucket

USERS = np.array([INT64.min, -5, -1, 0, 1, 77, INT64.max], np.int64)

RECORDS = [
    Record(),
    Record(-3, 5, 1, 1_700_000_000, 0, 0, (pack_extent(0, 1, 2),)),
    Record(INT64.min, 2**64 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1, 3, (pack_extent(7, 3, 5),)),
    Record(INT64.max, 0, 0, 0, 9, int(Flag.EVICTED), ()),
    Record(40, 2, 8, 9, 0, 2, tuple(pack_extent(128 * i, 7, 128) for i in range(40))),
]


@pytest.mark.parametrize("user_id", USERS.tolist())
@pytest.mark.parametrize("record", RECORDS)
def test_a_record_comes_back(record: Record, user_id: int) -> None:
    data = record.pack(user_id)
    assert len(data) == HEAD_BYTES + 8 * len(record.extents)
    assert Record.unpack(data, user_id) == record
    assert Record.unpack(memoryview(data), user_id) == record


def test_extents_keep_their_parts() -> None:
    for start, size_class, count in [(0, 0, 0), (2**40 - 1, 255, 65535), (12, 3, 7)]:
        extent = pack_extent(start, size_class, count)
        assert extent < 1 << 64
        parts = extent_start(extent), extent_class(extent), extent_count(extent)
        assert parts == (start, size_class, count)


def test_every_flipped_bit_and_every_other_user_is_damage() -> None:
    data = RECORDS[2].pack(77)
    for bit in range(8 * len(data)):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        assert Record.unpack(bytes(broken), 77) is None
        batch = RecordBatch.of([bytes(broken)], np.array([77]))
        assert batch.damaged.tolist() == [True]
    assert Record.unpack(data, 78) is None
    assert Record.unpack(bytes(len(data)), 77) is None
    for size in range(len(data)):
        if size != 0:
            assert record_words(data[:size], 77) is None


def test_columns_of_a_batch_agree_with_its_records_one_by_one() -> None:
    records = [RECORDS[i % len(RECORDS)] for i in range(len(USERS))]
    values: list[bytes | None] = [r.pack(u) for r, u in zip(records, USERS.tolist(), strict=True)]
    for absent, damaged in [((), ()), ((1, 4), ()), ((0,), (2, 6)), ((), tuple(range(7)))]:
        stored = list(values)
        for index in absent:
            stored[index] = None
        for index in damaged:
            stored[index] = (stored[index] or b"")[:-1] if index % 2 else bytes(48)
        batch = RecordBatch.of(stored, USERS)
        assert np.flatnonzero(batch.absent).tolist() == list(absent)
        assert np.flatnonzero(batch.damaged).tolist() == list(damaged)
        for index, user_id in enumerate(USERS.tolist()):
            found = batch.record(index)
            if index in absent or index in damaged:
                assert found is None
                assert batch.num_extents[index] == 0
                continue
            expected = records[index]
            assert found == expected
            assert batch.newest_ms[index] == expected.newest_ms
            assert batch.newest_key[index] == expected.newest_key
            assert batch.version[index] == expected.version
            assert batch.written_s[index] == expected.written_s
            assert batch.flags[index] == expected.flags
            assert batch.num_extents[index] == len(expected.extents)
            assert batch.words_of(index) == record_words(stored[index] or b"", user_id)


def test_a_batch_of_nobody() -> None:
    batch = RecordBatch.of([], np.empty(0, np.int64))
    assert batch.newest_ms.tolist() == []
    assert batch.num_extents.tolist() == []


def test_keys_tell_users_apart_and_sort_like_them_within_a_bucket() -> None:
    keys = record_keys(USERS)
    assert keys == [record_key(user) for user in USERS.tolist()]
    assert [len(key) for key in keys] == [KEY_BYTES] * len(USERS)
    assert [user_of_key(key) for key in keys] == USERS.tolist()
    assert users_of_keys(keys).tolist() == USERS.tolist()
    assert [key[0] for key in keys] == user_bucket(USERS).tolist()
    unsigned = [key[1:] for key in keys]
    assert unsigned == sorted(unsigned)
