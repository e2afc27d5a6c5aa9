"""Vectorised masks, packing and upserts equal their plainest statement, for any input."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_events import make_events, make_rows, replaced

from marm.events import BINARY_TASKS, TASKS, merge_feedback, pack_feedback
from marm.items import ItemCatalog, ItemFeatures
from marm.memory import RAW_STEP, InProcessMemory, Namespace, upsert_rows
from marm.metrics import auc
from marm.sequence import (
    Queries,
    Slab,
    View,
    distance_bucket,
    gap_bucket,
    view_block,
    view_slab,
)

NAMESPACE = Namespace(depth=1, dim=2, dtype="float32")

HISTORY = st.lists(  # (user, time, enters)
    st.tuples(st.integers(0, 2), st.integers(0, 15), st.booleans()), min_size=1, max_size=24
)


@settings(max_examples=150, deadline=None)
@given(history=HISTORY, stored=st.integers(0, 24), n=st.integers(1, 6), beyond=st.booleans())
def test_slab_and_block_together_show_the_newest_n(
    history: list[tuple[int, int, bool]], stored: int, n: int, beyond: bool
) -> None:
    """The first ``stored`` events (by time) are rows, the others a batch. With ``beyond``, all
    events are rows as well, and reading back in time must show the same."""
    history = sorted(history, key=lambda event: event[1])
    stored = min(stored, len(history) - 1)
    while stored > 0 and history[stored - 1][1] >= history[stored][1]:
        stored -= 1  # a batch never begins inside a moment
    users, stamps = (np.array([event[i] for event in history], np.int64) for i in range(2))
    enters = np.array([event[2] for event in history])
    keys = np.arange(len(history)).astype(np.uint64) * np.uint64(7) % np.uint64(25)
    memory = InProcessMemory(NAMESPACE)
    kept = np.flatnonzero(enters & ((np.arange(len(history)) < stored) | beyond))
    memory.save(users[kept], make_rows(NAMESPACE, stamps[kept].tolist(), 0, keys[kept].tolist()))
    asked = np.array([2, 0, 1])
    batch = np.arange(stored, len(history))
    user_row = np.array([1, 2, 0])[users[batch]]
    queries = Queries(user_row, stamps[batch])
    slab = Slab.of(memory.fetch(asked, 100 if beyond else n), 100 if beyond else n)
    events = replaced(
        make_events(len(batch)),
        user_id=users[batch],
        timestamp_ms=stamps[batch],
        event_key=keys[batch],
    )
    if beyond:
        from_slab = view_slab(slab, queries, np.zeros(len(batch), np.int64), n)
        from_block = None
    else:
        from_block, predecessors = view_block(events, user_row, enters[batch], n)
        from_slab = view_slab(slab, queries, predecessors, n)
    for index, event in enumerate(batch):
        past = [
            (int(stamps[j]), int(keys[j]))
            for j in range(len(history))
            if users[j] == users[event] and enters[j] and stamps[j] < stamps[event]
        ]
        newest = sorted(past, reverse=True)[:n]
        expected = {
            identity: (
                int(distance_bucket(np.array([rank + 1]))[0]),
                int(gap_bucket(stamps[[event]] - identity[0])[0]),
            )
            for rank, identity in enumerate(newest)
        }
        rows = slab.rows[user_row[index]]
        seen = _seen(from_slab, index, rows["timestamp_ms"], rows["event_key"])
        if from_block is not None:
            own = _seen(from_block, index, events.timestamp_ms, events.event_key)
            assert not seen.keys() & own.keys()
            seen |= own
        assert seen == expected


def _seen(
    view: View, query: int, stamps: np.ndarray, keys: np.ndarray
) -> dict[tuple[int, int], tuple[int, int]]:
    return {
        (int(stamps[k]), int(keys[k])): (int(view.distance[query, k]), int(view.gap[query, k]))
        for k in np.flatnonzero(view.visible[query])
    }


LABEL = st.one_of(st.just(float("nan")), st.sampled_from([0.0, 1.0]))
ROW = st.tuples(*[LABEL] * len(BINARY_TASKS), st.one_of(st.just(float("nan")), st.floats(0, 1e6)))


@settings(max_examples=100, deadline=None)
@given(first=ROW, second=ROW)
def test_feedback_packs_what_was_observed_and_merging_is_packing_the_union(
    first: tuple[float, ...], second: tuple[float, ...]
) -> None:
    rows = np.array([first, second], np.float32)
    packed = pack_feedback(rows)
    for row, value in zip(rows, packed.tolist(), strict=True):
        for bit in range(len(BINARY_TASKS)):
            assert bool(value >> bit & 1) == (row[bit] > 0)
        assert bool(value >> len(BINARY_TASKS) & 1) == (not np.isnan(row).all())
        assert (value >> 8 == 0) == bool(np.isnan(row[-1]))
    union = np.fmax(rows[0], rows[1])[None]  # NaN only where both are
    merged = merge_feedback(packed[:1], packed[1:])
    assert merged.tolist() == pack_feedback(union).tolist()


SAVED = st.lists(  # (time, key, raw, feedback)
    st.tuples(st.integers(0, 4), st.integers(0, 2), st.booleans(), st.integers(0, 63)),
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(saves=st.lists(SAVED, max_size=4))
def test_upserts_equal_a_dictionary(saves: list[list[tuple[int, int, bool, int]]]) -> None:
    held = np.empty(0, NAMESPACE.row_dtype)
    expected: dict[tuple[int, int], tuple[int, int]] = {}  # to (step, feedback)
    step = 0
    for save in saves:
        rows = make_rows(NAMESPACE, [s for s, *_ in save], 0, [k for _, k, *_ in save])
        for row, (stamp, key, raw, feedback) in zip(rows, save, strict=True):
            step += 1
            row["feedback"] = feedback
            row["written_step"] = RAW_STEP if raw else step
            row["memory"] = 0 if raw else step
            old_step, old_feedback = expected.get((stamp, key), (RAW_STEP, 0))
            expected[stamp, key] = (old_step if raw else step, old_feedback | feedback)
        held = upsert_rows(held, rows)
    assert [(int(r["timestamp_ms"]), int(r["event_key"])) for r in held] == sorted(expected)
    for row in held:
        identity = int(row["timestamp_ms"]), int(row["event_key"])
        assert (row["written_step"], row["feedback"]) == expected[identity]
        assert (row["memory"] == max(0, expected[identity][0])).all()


@settings(max_examples=100, deadline=None)
@given(
    entries=st.lists(st.tuples(st.integers(-4, 4), st.integers(1, 9)), max_size=12),
    asked=st.lists(st.integers(-6, 6), max_size=8),
)
def test_a_catalog_equals_a_dictionary(entries: list[tuple[int, int]], asked: list[int]) -> None:
    ids, tags = (np.array([entry[i] for entry in entries], np.int64) for i in range(2))
    catalog = ItemCatalog(ItemFeatures(ids, tags, tags, tags))
    expected = dict(entries)
    found = catalog.lookup(np.array(asked, np.int64))
    assert found.item_id.tolist() == asked
    assert found.tag_id.tolist() == [expected.get(item, 0) for item in asked]
    assert catalog.contains(np.array(asked, np.int64)).tolist() == [i in expected for i in asked]
    assert len(catalog) == len(expected)


@settings(max_examples=100, deadline=None)
@given(samples=st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=30))
def test_auc_is_symmetric_and_ignores_monotone_maps(samples: list[tuple[bool, int]]) -> None:
    labels, scores = (np.array([sample[i] for sample in samples]) for i in range(2))
    value = auc(labels, scores)
    if np.isnan(value):
        assert labels.all() or not labels.any()
        return
    np.testing.assert_allclose(auc(~labels, -scores), value)
    np.testing.assert_allclose(auc(labels, np.exp(scores) - 3), value)
    np.testing.assert_allclose(auc(labels, -scores), 1 - value)


def test_tasks_are_part_of_the_format() -> None:
    assert TASKS == ("click", "long_view", "like", "comment", "forward", "follow", "watch_time")
