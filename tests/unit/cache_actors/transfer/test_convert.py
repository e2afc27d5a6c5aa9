"""Conversion between dtypes: exact rows, repeatable, safe beside a trainer of the target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from cache_actors.store.row_formats import as_read
from cache_actors.transfer.convert import Converted, convert_buckets, convert_namespace
from marm.addressing import NUM_BUCKETS, user_bucket
from marm.memory import RAW_STEP, DoneAck, InProcessMemory, Namespace, UserRows

WIDE = Namespace(depth=2, dim=3, dtype="float32")
HALF, BYTES = replace(WIDE, dtype="float16"), replace(WIDE, dtype="int8")
USERS = np.arange(700) * 1_000_003 - 5


def some_rows(namespace: Namespace, rows_per_user: int = 3, step: int = 5) -> NDArray[np.void]:
    rng = np.random.default_rng(step)
    rows = np.zeros(len(USERS) * rows_per_user, namespace.row_dtype)
    rows["timestamp_ms"] = np.tile(np.arange(rows_per_user) * 10, len(USERS))
    rows["event_key"] = np.arange(len(rows)) % 2 + 1  # keys repeat within a user
    rows["item_id"] = np.arange(len(rows)) + 9
    rows["feedback"] = 1
    rows["memory"] = rng.normal(size=rows["memory"].shape)
    rows["written_step"] = step
    rows["written_s"] = 1_700_000_000
    return rows


@pytest.fixture
def source() -> InProcessMemory:
    memory = InProcessMemory(WIDE)
    memory.save(USERS.repeat(3), some_rows(WIDE))
    return memory


def everything(memory: InProcessMemory) -> NDArray[np.void]:
    return memory.fetch(USERS, 1000).rows


class StoreOfBytes(InProcessMemory):
    """Keeps int8 rows as a store does, and counts what it is asked to save."""

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(namespace)
        self.saved_rows = self.largest_save = 0

    def save(self, user_ids: NDArray[np.int64], rows: NDArray[np.void]) -> DoneAck:
        self.saved_rows += len(rows)
        self.largest_save = max(self.largest_save, len(rows))
        return super().save(user_ids, as_read(self.namespace, rows))


@pytest.mark.parametrize("namespace", [HALF, BYTES])
def test_every_row_arrives(source: InProcessMemory, namespace: Namespace) -> None:
    target = StoreOfBytes(namespace)
    done = convert_namespace(source, target)
    assert done == Converted(NUM_BUCKETS, len(USERS), 3 * len(USERS), 3 * len(USERS))
    got, sent = everything(target), everything(source)
    expected = sent.astype(namespace.row_dtype)
    assert got.tobytes() == as_read(namespace, expected).tobytes()


def test_from_int8_nothing_more_is_lost(source: InProcessMemory) -> None:
    small = StoreOfBytes(BYTES)
    convert_namespace(source, small)
    wide, again = InProcessMemory(WIDE), StoreOfBytes(BYTES)
    convert_namespace(small, wide)
    np.testing.assert_array_equal(everything(wide)["memory"], everything(small)["memory"])
    convert_namespace(wide, again)
    assert everything(again).tobytes() == everything(small).tobytes()


def test_a_second_conversion_writes_nothing(source: InProcessMemory) -> None:
    target = StoreOfBytes(BYTES)
    convert_namespace(source, target)
    before, target.saved_rows = everything(target), 0
    assert convert_namespace(source, target).rows_written == target.saved_rows == 0
    assert everything(target).tobytes() == before.tobytes()


def test_one_that_stopped_goes_on(source: InProcessMemory) -> None:
    target = StoreOfBytes(HALF)
    for _, done in zip(range(NUM_BUCKETS // 2), convert_buckets(source, target), strict=False):
        assert done.buckets == 1
    assert 0 < target.saved_rows < len(USERS) * 3
    left = convert_namespace(source, target)
    assert left.rows == len(USERS) * 3
    assert target.saved_rows == len(USERS) * 3
    assert everything(target).tobytes() == everything(source).astype(HALF.row_dtype).tobytes()


def test_only_the_buckets_asked_for(source: InProcessMemory) -> None:
    target = StoreOfBytes(HALF)
    bucket = int(user_bucket(USERS[0])[0])
    done = convert_namespace(source, target, [bucket])
    mine = USERS[user_bucket(USERS) == bucket]
    assert done.users == len(mine)
    assert (target.fetch(USERS, 10).counts > 0).sum() == len(mine)


def test_rows_written_meanwhile_arrive_with_the_next_conversion(source: InProcessMemory) -> None:
    target = StoreOfBytes(HALF)
    convert_namespace(source, target)
    later = some_rows(WIDE, step=8)[:2]
    later["timestamp_ms"] = [0, 99]
    source.save(USERS[:1].repeat(2), later)
    assert convert_namespace(source, target).rows_written == 2
    assert everything(target).tobytes() == everything(source).astype(HALF.row_dtype).tobytes()


def test_what_training_wrote_to_the_target_stays(source: InProcessMemory) -> None:
    target = StoreOfBytes(HALF)
    newer = some_rows(HALF, step=8)
    extra = some_rows(HALF, rows_per_user=9, step=8)  # more rows than the source has
    extra["timestamp_ms"] += 1
    target.save(USERS.repeat(9), extra)
    target.save(USERS.repeat(3), newer)
    assert convert_namespace(source, target).rows_written == 0
    got = everything(target)
    assert len(got) == 12 * len(USERS)
    assert (got["written_step"] == 8).all()


def test_feedback_of_both_is_merged_and_the_newer_memory_stays(source: InProcessMemory) -> None:
    target = StoreOfBytes(HALF)
    newer = some_rows(HALF, step=8)
    newer["feedback"] = 2
    target.save(USERS.repeat(3), newer)
    convert_namespace(source, target)
    newer["feedback"] = 3
    assert everything(target).tobytes() == newer.tobytes()
    assert convert_namespace(source, target).rows_written == 0


def test_a_raw_row_gives_way_to_a_computed_one(source: InProcessMemory) -> None:
    target = StoreOfBytes(HALF)
    raw = some_rows(HALF)
    raw["written_step"], raw["written_s"], raw["memory"] = RAW_STEP, 0, 0
    target.save(USERS.repeat(3), raw)
    convert_namespace(source, target)
    assert everything(target).tobytes() == everything(source).astype(HALF.row_dtype).tobytes()


def test_rows_without_layers() -> None:
    namespace = Namespace(depth=0, dtype="float32")
    source, target = InProcessMemory(namespace), InProcessMemory(replace(namespace, dtype="int8"))
    source.save(USERS.repeat(3), some_rows(namespace))
    assert convert_namespace(source, target).rows_written == 3 * len(USERS)
    assert everything(target)["item_id"].tolist() == everything(source)["item_id"].tolist()


class InSmallParts(InProcessMemory):
    """Scans two users at a time."""

    def scan(self, bucket: int) -> Iterator[UserRows]:
        for part in super().scan(bucket):
            for start in range(0, len(part.user_ids), 2):
                yield self.fetch(part.user_ids[start : start + 2], 1000)


def test_no_more_is_held_than_a_scan_gives_at_a_time() -> None:
    source, target = InSmallParts(WIDE), StoreOfBytes(BYTES)
    source.save(USERS.repeat(3), some_rows(WIDE))
    convert_namespace(source, target)
    assert target.largest_save == 2 * 3
    assert len(everything(target)) == 3 * len(USERS)


class TestRefused:
    @pytest.mark.parametrize(
        "other",
        [WIDE, replace(HALF, depth=1), replace(HALF, epoch=1), replace(HALF, family="other")],
    )
    def test_namespaces_that_differ_otherwise(
        self, source: InProcessMemory, other: Namespace
    ) -> None:
        target = StoreOfBytes(other)
        with pytest.raises(ValueError, match=f"differ in dtype alone.*{WIDE.name}"):
            convert_namespace(source, target)
        assert target.saved_rows == 0

    def test_numbers_beyond_float16(self, source: InProcessMemory) -> None:
        rows = some_rows(WIDE)[:1]
        rows["event_key"], rows["memory"][0, 1, 2] = 77, 1e5
        source.save(USERS[:1], rows)
        with pytest.raises(ValueError, match="event 77 reaches 100000, the limit is 65504"):
            convert_namespace(source, StoreOfBytes(HALF))
