"""Micro-batches never need two sets of rows for one user."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from marm.events import TASKS, EventBatch
from train.batcher import Batcher


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
