"""The allocator of row places: nothing is given twice, nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_actors.store.extents import ExtentAllocator, class_for, top_class
from cache_actors.store.records import extent_class, extent_start


def places_of(extent: int) -> set[int]:
    start = extent_start(extent)
    return set(range(start, start + (1 << extent_class(extent))))


def take(allocator: ExtentAllocator, size_class: int) -> int:
    extent = allocator.take(size_class)
    assert extent is not None
    assert extent_start(extent) % (1 << size_class) == 0
    return extent


@pytest.mark.parametrize(
    ("row_bytes", "expected"),
    [(56, 7), (184, 7), (376, 7), (384, 7), (392, 6), (1080, 5), (24_576, 1), (10**6, 1)],
)
def test_chunks_are_of_at_most_48_kb_and_128_rows(row_bytes: int, expected: int) -> None:
    assert top_class(row_bytes) == expected


def test_the_smallest_class_with_room() -> None:
    assert [class_for(rows) for rows in (1, 2, 3, 4, 5, 8, 9, 128)] == [1, 1, 2, 2, 3, 3, 4, 7]


def test_buddies_split_and_merge_again() -> None:
    allocator = ExtentAllocator(4)
    assert allocator.take(1) is None
    allocator.add_places(0, 16)
    small = [take(allocator, 1) for _ in range(8)]
    assert allocator.free_rows == 0
    assert set().union(*map(places_of, small)) == set(range(16))
    for extent in small:
        allocator.release(extent)
    assert allocator.take(1) is None  # nothing is free before the transaction commits
    allocator.commit(5)
    assert allocator.take(1) is None
    assert (allocator.resting_rows, allocator.unused_rows) == (16, 16)
    allocator.wake(4)  # a reader still sees transaction 4
    assert allocator.has_resting
    allocator.wake(5)
    assert not allocator.has_resting
    assert places_of(take(allocator, 4)) == set(range(16))


def test_an_abort_undoes_what_was_taken_and_released() -> None:
    allocator = ExtentAllocator(3)
    allocator.add_places(0, 8)
    held = take(allocator, 1)
    allocator.commit(1)
    take(allocator, 1)
    take(allocator, 2)
    allocator.release(held)
    allocator.abort()
    assert allocator.free_rows == 6
    assert not allocator.has_resting
    allocator.commit(2)
    assert not allocator.has_resting
    allocator.release(held)
    allocator.commit(3)
    allocator.wake(None)
    assert places_of(take(allocator, 3)) == set(range(8))


def test_what_is_not_used_is_free_after_opening() -> None:
    allocator = ExtentAllocator(3)
    used = np.array([[0, 1], [4, 2], [16, 3]], np.int64)
    allocator.rest_all_but(used, 32, transaction_id=9)
    assert allocator.resting_rows == 32 - 2 - 4 - 8
    assert allocator.take(1) is None
    allocator.wake(8)
    assert allocator.take(1) is None
    allocator.wake(9)
    taken = [take(allocator, 1) for _ in range(9)]
    assert allocator.take(1) is None
    assert set().union(*map(places_of, taken)) == set(range(32)) - {0, 1, *range(4, 8)} - set(
        range(16, 24)
    )


steps = st.one_of(
    st.tuples(st.just("take"), st.integers(1, 4)),
    st.tuples(st.just("release"), st.integers(0, 1000)),
    st.tuples(st.sampled_from(["commit", "abort", "wake", "grow", "reopen"]), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, max_size=80))
def test_extents_never_overlap_and_all_of_them_come_back(script: list[tuple[str, int]]) -> None:
    allocator, capacity, transaction = ExtentAllocator(4), 0, 0
    held: list[int] = []  # as of the last commit
    now: list[int] = []  # as of the transaction under way
    for action, value in script:
        if action == "take":
            extent = allocator.take(value)
            if extent is not None:
                now.append(extent)
        elif action == "release" and now:
            extent = now[value % len(now)]
            if extent in held:  # what a transaction took it does not release again
                now.remove(extent)
                allocator.release(extent)
        elif action == "commit":
            transaction += 1
            allocator.commit(transaction)
            held = list(now)
        elif action == "abort":
            allocator.abort()
            now = list(held)
        elif action == "wake":
            allocator.wake(None)
        elif action == "grow" and capacity < 160:
            allocator.add_places(capacity, capacity + 16)
            capacity += 16
        elif action == "reopen":
            allocator, now = ExtentAllocator(4), list(held)
            used = [(extent_start(extent), extent_class(extent)) for extent in held]
            table = np.array(used, np.int64).reshape(-1, 2)
            allocator.rest_all_but(table, capacity, transaction)
        used_places = [place for extent in {*held, *now} for place in places_of(extent)]
        assert len(used_places) == len(set(used_places))
        in_use = sum(len(places_of(extent)) for extent in now)
        assert allocator.unused_rows == capacity - in_use
    allocator.abort()
    for extent in held:
        allocator.release(extent)
    allocator.commit(transaction + 1)
    allocator.wake(None)
    whole = [take(allocator, 4) for _ in range(capacity // 16)]
    assert allocator.take(1) is None
    assert set().union(*map(places_of, whole)) == set(range(capacity))
