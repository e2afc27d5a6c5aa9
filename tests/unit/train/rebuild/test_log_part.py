"""The part of a log before some offsets is what a reader had handed out there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sample_events import make_events, replaced

from cache_actors.event_log.erase import erase_user
from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from marm.addressing import NUM_BUCKETS, user_bucket
from marm.events import EventBatch
from train.rebuild.log_part import events_before, num_rows_before

BUCKETS = np.arange(NUM_BUCKETS)


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    """Segments of one file and of several parts."""
    log = EventLog(tmp_path / "log", max_segment_events=120)
    for seed, size in enumerate((50, 300, 7, 130)):
        events = make_events(size, 40, seed)
        log.append(replaced(events, timestamp_ms=events.timestamp_ms + seed * 10_000_000))
    return log


def keys_of(batches: list[EventBatch]) -> list[int]:
    return sorted(EventBatch.concat(batches).event_key.tolist())


@pytest.mark.parametrize("num_read", [1, 49, 50, 51, 170, 333, 357, 487])
def test_it_is_what_a_reader_had_handed_out(log: EventLog, num_read: int) -> None:
    reader = log.reader(LogOffsets.start())
    handed_out = reader.next(num_read)
    assert handed_out is not None
    part = list(events_before(log, reader.offsets, BUCKETS))
    assert keys_of(part) == sorted(handed_out.event_key.tolist())
    buckets = np.arange(100, 180)
    mine = np.isin(user_bucket(handed_out.user_id), buckets)
    part = list(events_before(log, reader.offsets, buckets))
    assert keys_of(part) == sorted(handed_out.event_key[mine].tolist())
    assert num_rows_before(log, reader.offsets, BUCKETS) == num_read
    assert num_rows_before(log, reader.offsets, buckets) == mine.sum()


def test_workers_at_different_places_have_each_their_own_part(log: EventLog) -> None:
    halves = [BUCKETS[::2], BUCKETS[1::2]]
    readers = [log.reader(LogOffsets.start(), half) for half in halves]
    parts = [reader.next(count) for reader, count in zip(readers, (30, 200), strict=True)]
    end = LogOffsets.merge([reader.offsets for reader in readers], halves)
    handed_out = EventBatch.concat([part for part in parts if part is not None])
    assert keys_of(list(events_before(log, end, BUCKETS))) == sorted(handed_out.event_key.tolist())


def test_nothing_comes_before_the_start(log: EventLog) -> None:
    assert keys_of(list(events_before(log, LogOffsets.start(), BUCKETS))) == []


def test_no_buckets_have_no_events(log: EventLog) -> None:
    assert list(events_before(log, log.end(), np.empty(0, np.int64))) == []


def test_erased_users_are_gone_and_others_keep_their_places(log: EventLog, tmp_path: Path) -> None:
    reader = log.reader(LogOffsets.start())
    handed_out = reader.next(250)
    assert handed_out is not None
    user = int(handed_out.user_id[0])
    assert erase_user(tmp_path / "log", user, 1 << 60).events
    left = handed_out.take(handed_out.user_id != user)
    part = list(events_before(EventLog(tmp_path / "log"), reader.offsets, BUCKETS))
    assert keys_of(part) == sorted(left.event_key.tolist())
