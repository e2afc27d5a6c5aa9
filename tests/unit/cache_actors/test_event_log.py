from __future__ import annotations

import multiprocessing
import os
import threading
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from marm.addressing import user_bucket
from marm.events import TASKS, EventBatch


def random_events(num_events: int, seed: int = 0, first_key: int = 0) -> EventBatch:
    rng = np.random.default_rng(seed)
    labels = rng.random((num_events, len(TASKS))).astype(np.float32)
    labels[rng.random(labels.shape) < 0.4] = np.nan
    return EventBatch(
        user_id=rng.integers(-5, 200, num_events),
        item_id=rng.integers(0, 2**62, num_events),
        timestamp_ms=rng.integers(1_000, 2_000, num_events),
        event_key=np.uint64(2**63) + np.arange(first_key, first_key + num_events, dtype=np.uint64),
        author_id=rng.integers(0, 9, num_events),
        tag_id=rng.integers(0, 9, num_events),
        duration_ms=rng.integers(0, 60_000, num_events),
        context_id=rng.integers(0, 9, num_events).astype(np.int32),
        labels=labels,
    )


def in_time_order(events: EventBatch) -> EventBatch:
    return events.take(np.lexsort((events.event_key, events.timestamp_ms)))


def assert_same_events(got: EventBatch, expected: EventBatch) -> None:
    for field in fields(EventBatch):
        left, right = getattr(got, field.name), getattr(expected, field.name)
        assert left.dtype == right.dtype, field.name
        np.testing.assert_array_equal(left, right, err_msg=field.name)


def read_all(log: EventLog, offsets: LogOffsets | None = None, max_events: int = 64) -> EventBatch:
    return EventBatch.concat(list(log.read(offsets or LogOffsets.start(), max_events=max_events)))


def test_what_was_appended_is_read_back_in_time_order(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    first, second = random_events(300, seed=1), random_events(50, seed=2, first_key=300)
    assert (log.append(first), log.append(second)) == (1, 2)
    expected = EventBatch.concat([in_time_order(first), in_time_order(second)])
    assert_same_events(read_all(EventLog(tmp_path)), expected)
    assert log.last_segment() == 2
    assert log.num_events() == 350
    assert log.problems == []


def test_batches_are_full_across_segments(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    for part in range(7):
        log.append(random_events(10, seed=part, first_key=10 * part))
    sizes = [len(batch) for batch in log.read(LogOffsets.start(), max_events=32)]
    assert sizes == [32, 32, 6]


def test_an_empty_log_reads_as_nothing(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "absent")
    assert log.reader(LogOffsets.start()).next(10) is None
    assert (log.last_segment(), log.num_events(), log.problems) == (0, 0, [])
    assert log.end() == LogOffsets.start()


def test_an_empty_append_makes_no_segment(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    assert log.append(EventBatch.empty()) == 0
    log.append(random_events(3))
    assert log.append(EventBatch.empty()) == 1
    assert log.last_segment() == 1


def test_a_huge_append_is_one_segment_of_parts_in_time_order(tmp_path: Path) -> None:
    log = EventLog(tmp_path, max_segment_events=100)
    events = random_events(1_050)
    assert log.append(events) == 1
    assert len(list((tmp_path / "segments" / "000000000001.parquet").iterdir())) == 11
    assert log.append(random_events(5, seed=9, first_key=2_000)) == 2
    assert log.num_events() == 1_055
    got = read_all(EventLog(tmp_path))
    assert_same_events(got.take(slice(0, 1_050)), in_time_order(events))


def test_tailing_sees_what_is_committed_meanwhile(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    reader = EventLog(tmp_path).reader(LogOffsets.start())
    assert reader.next(100) is None
    seen = []
    for part in range(5):
        log.append(random_events(20, seed=part, first_key=20 * part))
        seen.append(reader.next(15))
        seen.append(reader.next(15))
        assert reader.next(15) is None
        assert reader.offsets == log.end()
    got = EventBatch.concat([batch for batch in seen if batch is not None])
    assert_same_events(got, read_all(log))


def test_a_reader_of_some_buckets_gets_exactly_those(tmp_path: Path) -> None:
    log = EventLog(tmp_path, max_segment_events=400)
    events = random_events(1_000)
    log.append(events)
    everything = in_time_order(events)
    for world_size in (2, 5):
        for rank in range(world_size):
            owned = np.arange(rank, 256, world_size)
            got = EventBatch.concat(list(log.read(LogOffsets.start(), owned, max_events=77)))
            mine = np.isin(user_bucket(everything.user_id), owned)
            assert_same_events(got, everything.take(mine))
            assert log.num_events(LogOffsets.start(), owned) == mine.sum()


def test_row_groups_are_cut_at_buckets_and_read_alone(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    events = random_events(100_000)
    log.append(events)
    footer = log.footer(log.files_of(1)[0])
    assert footer is not None
    assert len(footer.row_group_starts) > 3
    everything = in_time_order(events)
    owned = np.arange(0, 20)
    got = EventBatch.concat(list(log.read(LogOffsets.start(), owned, max_events=4096)))
    assert_same_events(got, everything.take(np.isin(user_bucket(everything.user_id), owned)))


@pytest.mark.parametrize("owned", [np.arange(256), np.arange(3, 256, 7), np.arange(100, 140)])
def test_resuming_inside_a_large_file_reads_the_rest_of_each_bucket(
    tmp_path: Path, owned: NDArray
) -> None:
    log = EventLog(tmp_path, max_segment_events=60_000)
    log.append(random_events(100_000))
    offsets, seen = LogOffsets.start(), []
    while (batch := (reader := log.reader(offsets, owned)).next(9_999)) is not None:
        seen.append(batch)
        offsets = reader.offsets
    assert_same_events(
        EventBatch.concat(seen),
        EventBatch.concat(list(log.read(LogOffsets.start(), owned, max_events=100_000))),
    )


def test_a_reader_of_no_buckets_reads_nothing(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append(random_events(5))
    assert log.reader(LogOffsets.start(), []).next(10) is None


def test_num_events_counts_what_offsets_leave(tmp_path: Path) -> None:
    log = EventLog(tmp_path, max_segment_events=40)
    log.append(random_events(100))
    log.append(random_events(30, seed=1, first_key=100))
    reader = log.reader(LogOffsets.start())
    left = 130
    while (batch := reader.next(17)) is not None:
        left -= len(batch)
        assert log.num_events(reader.offsets) == left
    assert left == 0
    assert log.num_events() == 130


def test_offsets_of_another_log_are_refused(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append(random_events(5))
    with pytest.raises(ValueError, match=r"offsets reach segment 7, but the log .* ends at 1"):
        log.reader(LogOffsets.at_segment(7))


@pytest.mark.parametrize("max_events", [0, -1])
def test_max_events_must_be_positive(tmp_path: Path, max_events: int) -> None:
    with pytest.raises(ValueError, match="max_events must be at least 1"):
        EventLog(tmp_path).reader(LogOffsets.start()).next(max_events)


def _broken(column: str, value: NDArray) -> EventBatch:
    events = random_events(4)
    return EventBatch(**{f.name: getattr(events, f.name) for f in fields(events)} | {column: value})


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (_broken("item_id", np.zeros(3, np.int64)), "'item_id' must have shape"),
        (_broken("timestamp_ms", np.zeros(4, np.float64)), "'timestamp_ms' must be int64"),
        (_broken("event_key", np.zeros(4, np.int64)), "'event_key' must be uint64"),
        (_broken("labels", np.zeros((4, 2), np.float32)), "labels must have shape"),
        (_broken("labels", np.full((4, 7), np.inf, np.float32)), "labels must be finite"),
    ],
)
def test_malformed_batches_are_refused_and_store_nothing(
    tmp_path: Path, events: EventBatch, message: str
) -> None:
    log = EventLog(tmp_path)
    with pytest.raises(ValueError, match=message):
        log.append(events)
    assert log.last_segment() == 0


def test_threads_append_to_one_log_without_loss(tmp_path: Path) -> None:
    log = EventLog(tmp_path, max_segment_events=8)

    def append(writer: int) -> None:
        for turn in range(6):
            key = 1_000 * writer + 20 * turn
            # Every other append is larger than a file, so files and directories compete.
            log.append(random_events(5 if turn % 2 else 20, seed=key, first_key=key))

    writers = [threading.Thread(target=append, args=(writer,)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert log.last_segment() == 24
    assert len(np.unique(read_all(log).event_key)) == log.num_events() == 4 * (3 * 20 + 3 * 5)


def _append_for_ever(path: Path) -> None:
    log = EventLog(path, max_segment_events=10)
    while True:
        log.append(random_events(35))


def test_a_killed_writer_leaves_whole_appends_only(tmp_path: Path) -> None:
    writer = multiprocessing.get_context("spawn").Process(target=_append_for_ever, args=(tmp_path,))
    writer.start()
    log = EventLog(tmp_path)
    while log.last_segment() < 8:
        assert writer.is_alive()
    writer.kill()
    writer.join()
    assert log.num_events() == 35 * log.last_segment()
    assert len(read_all(log)) == 35 * log.last_segment()
    assert log.problems == []
    assert log.append(random_events(5)) == log.last_segment()
    for path in (tmp_path / "segments").glob(".pending-*"):
        os.utime(path, (0, 0))
    log.remove_abandoned()
    assert not list((tmp_path / "segments").glob(".pending-*"))


def _append_in_process(path: Path, writer: int, turns: int) -> None:
    log = EventLog(path)
    for turn in range(turns):
        key = 1_000 * writer + 10 * turn
        log.append(random_events(10, seed=key, first_key=key))


def test_processes_append_while_a_reader_tails(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [
        context.Process(target=_append_in_process, args=(tmp_path, writer, 15))
        for writer in range(2)
    ]
    for writer in writers:
        writer.start()
    reader = EventLog(tmp_path).reader(LogOffsets.start())
    seen: list[EventBatch] = []
    while any(writer.is_alive() for writer in writers):
        batch = reader.next(7)
        if batch is not None:
            seen.append(batch)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    while (batch := reader.next(7)) is not None:
        seen.append(batch)
    assert_same_events(EventBatch.concat(seen), read_all(EventLog(tmp_path)))
    assert sum(map(len, seen)) == 300
    assert EventLog(tmp_path).last_segment() == 30
