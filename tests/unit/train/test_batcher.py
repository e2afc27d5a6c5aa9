"""Micro-batches never need two sets of rows for one user."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from marm.addressing import NUM_BUCKETS
from marm.events import TASKS, EventBatch
from train.batcher import NUM_CLOCKS, Batcher


def events_at(pairs: list[tuple[int, int]]) -> EventBatch:
    users = np.array([user for user, _ in pairs], np.int64)
    stamps = np.array([stamp for _, stamp in pairs], np.int64)
    zeros = np.zeros(len(pairs), np.int64)
    return EventBatch(
        users,
        np.arange(len(pairs), dtype=np.int64),
        stamps,
        np.arange(len(pairs), dtype=np.uint64),
        zeros,
        zeros,
        zeros,
        zeros.astype(np.int32),
        np.full((len(pairs), len(TASKS)), 1.0, np.float32),
    )


def cuts(tmp_path: Path, *reads: list[tuple[int, int]], keys: list[int] | None = None) -> list:
    """Timestamps of the micro-batches over one append per read."""
    log = EventLog(tmp_path)
    for pairs in reads:
        events = events_at(pairs)
        if keys is not None:
            events = replace(events, event_key=np.array(keys, np.uint64))
        log.append(events)
    batcher, found = Batcher(log.reader(LogOffsets.start()), 100), []
    while (batch := batcher.next()) is not None:
        found.append(batch.events.timestamp_ms.tolist())
    return found


def test_events_in_order_are_one_batch(tmp_path: Path) -> None:
    assert cuts(tmp_path, [(1, 5), (2, 6), (1, 6), (1, 7)]) == [[5, 6, 6, 7]]


def test_a_late_event_is_the_only_one_of_its_user(tmp_path: Path) -> None:
    assert cuts(tmp_path, [(1, 10), (1, 20), (1, 30)], [(1, 5), (2, 6), (1, 40)]) == [
        [10, 20, 30],
        [5, 6],
        [40],
    ]


def test_a_repeated_report_starts_the_next_batch(tmp_path: Path) -> None:
    assert cuts(tmp_path, [(1, 10), (1, 10), (1, 20)], keys=[7, 7, 8]) == [[10], [10, 20]]


def test_a_late_event_starts_the_next_batch(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append(events_at([(1, 10), (1, 20), (2, 15)]))
    log.append(events_at([(1, 12), (2, 30)]))  # (1, 12) arrives late
    batcher = Batcher(log.reader(LogOffsets.start()), 100)
    first, second = batcher.next(), batcher.next()
    assert first is not None
    assert second is not None
    assert first.events.timestamp_ms.tolist() == [10, 15, 20]
    assert first.resume is None  # inside a read that was split
    assert second.events.timestamp_ms.tolist() == [12, 30]
    assert second.resume == log.end()
    assert batcher.next() is None
    log.append(events_at([(3, 1)]))
    third = batcher.next()
    assert third is not None
    assert third.events.user_id.tolist() == [3]


def test_lateness_survives_a_restart(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append(events_at([(1, 10), (1, 20)]))
    log.append(events_at([(1, 5), (1, 40)]))
    batcher = Batcher(log.reader(LogOffsets.start()), 2)
    first = batcher.next()
    assert first is not None
    assert first.resume is not None
    assert first.state is not None
    continued = Batcher(log.reader(first.resume), 2)
    continued.restore(first.state)
    second = continued.next()
    assert second is not None
    assert second.events.timestamp_ms.tolist() == [5]  # the late one alone
    assert second.state is None


def test_what_is_remembered_does_not_grow_with_users(tmp_path: Path) -> None:
    users = [(user, user) for user in range(3000)]
    log = EventLog(tmp_path)
    log.append(events_at(users))
    batcher = Batcher(log.reader(LogOffsets.start()), 1000)
    sizes = []
    while (batch := batcher.next()) is not None:
        assert len(batch.events) == 1000  # in order, whoever shares a clock
        assert batch.state is not None
        sizes.append(batch.state.clocks_ms.nbytes)
    assert sizes == [NUM_CLOCKS * 8] * 3


def test_users_of_different_buckets_share_no_clock() -> None:
    assert NUM_CLOCKS % NUM_BUCKETS == 0


def test_a_read_of_skipped_events_is_not_the_end(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append(events_at([(1, -3), (2, -2), (3, 5)]))
    batcher = Batcher(log.reader(LogOffsets.start()), 2)
    batch = batcher.next()
    assert batch is not None
    assert batch.events.timestamp_ms.tolist() == [5]
    assert batch.resume == log.end()
