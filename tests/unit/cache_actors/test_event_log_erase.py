"""A forgotten user's events are gone from the files, and everything else is as it was."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from cache_actors.event_log.erase import (
    EraseError,
    erase_forgotten,
    erase_user,
    erase_users,
    user_events,
)
from cache_actors.event_log.forgotten import FILE_NAME, ForgottenUsers
from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.event_log.segments import SegmentError, read_footer, segment_path
from cache_actors.group_commit import GroupCommitter, RecentReports
from marm.addressing import user_bucket
from marm.events import TASKS, EventBatch

USER, OTHER = 7, 8
FAR_MS = 10**15


def some_events(num_events: int, seed: int, num_users: int = 20) -> EventBatch:
    """Events with many ties in time, whose items name their users."""
    rng = np.random.default_rng(seed)
    users = rng.integers(0, num_users, num_events)
    labels = rng.random((num_events, len(TASKS))).astype(np.float32)
    return EventBatch(
        user_id=users,
        item_id=1_000_000_000_000 + users * 1_000 + np.arange(num_events),
        timestamp_ms=rng.integers(1_000, 1_040, num_events),
        event_key=rng.integers(0, 2**63, num_events).astype(np.uint64),
        author_id=users + 500,
        tag_id=users + 600,
        duration_ms=users + 700,
        context_id=(users + 800).astype(np.int32),
        labels=labels,
    )


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    """Four segments, the last two of several parts."""
    EventLog(tmp_path).append(some_events(200, seed=1))
    EventLog(tmp_path).append(some_events(50, seed=2))
    parted = EventLog(tmp_path, max_segment_events=60)
    parted.append(some_events(200, seed=3))
    parted.append(some_events(150, seed=4))
    return EventLog(tmp_path)


def read_items(path: Path, offsets: LogOffsets | None = None, step: int = 17) -> list[int]:
    batches = EventLog(path).read(offsets or LogOffsets.start(), max_events=step)
    return [int(item) for batch in batches for item in batch.item_id]


def user_of(items: list[int]) -> NDArray[np.int64]:
    return np.array(items, np.int64) // 1_000 % 1_000


def columns_in_files(path: Path, name: str) -> NDArray:
    files = sorted((path / "segments").rglob("*.parquet"))
    tables = [pq.ParquetFile(file).read() for file in files if file.is_file()]
    return np.concatenate([table.column(name).to_numpy() for table in tables])


def test_the_user_is_gone_from_readers_and_files_and_nobody_else(
    log: EventLog, tmp_path: Path
) -> None:
    before = read_items(tmp_path)
    mine = int((user_of(before) == USER).sum())
    rows_before = len(columns_in_files(tmp_path, "user_id"))
    assert mine > 10
    assert len(user_events(log, USER)) == mine

    done = erase_user(tmp_path, USER, FAR_MS)
    assert (done.events, done.files_rewritten) == (mine, 9)
    assert read_items(tmp_path) == [item for item in before if user_of([item])[0] != USER]
    assert len(user_events(EventLog(tmp_path), USER)) == 0
    assert EventLog(tmp_path).num_events() == len(before) - mine
    assert EventLog(tmp_path).problems == []

    erased = columns_in_files(tmp_path, "bucket") == -1
    assert (erased.sum(), len(erased)) == (mine, rows_before)
    assert USER not in columns_in_files(tmp_path, "user_id")
    for name, marks in (("item_id", 0), ("author_id", 0), ("tag_id", 0), ("context_id", 0)):
        assert set(columns_in_files(tmp_path, name)[erased].tolist()) == {marks}
    assert np.isnan(columns_in_files(tmp_path, "like")[erased].astype(float)).all()


def test_nothing_of_the_user_is_left_in_any_file(log: EventLog, tmp_path: Path) -> None:
    keys = {int(key) for key in user_events(log, USER).event_key}
    erase_user(tmp_path, USER, FAR_MS)
    assert not keys & {int(key) for key in columns_in_files(tmp_path, "event_key")}
    files = [path for path in (tmp_path / "segments").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".parquet", ""}
    assert {path.name for path in files if not path.suffix} <= {".last", ".erasing"}


def test_events_after_the_given_time_stay(log: EventLog, tmp_path: Path) -> None:
    before = user_events(log, USER)
    until_ms = int(np.median(before.timestamp_ms))
    done = erase_user(tmp_path, USER, until_ms)
    after = user_events(EventLog(tmp_path), USER)
    assert done.events == int((before.timestamp_ms <= until_ms).sum()) > 0
    np.testing.assert_array_equal(after.event_key, before.event_key[before.timestamp_ms > until_ms])
    assert erase_user(tmp_path, USER, FAR_MS).events == len(after)


@pytest.mark.parametrize("step", [1, 7, 64])
def test_offsets_taken_before_continue_after(log: EventLog, tmp_path: Path, step: int) -> None:
    """Whatever was consumed when the erasure came, nothing is lost, repeated or reordered."""
    whole = read_items(tmp_path)
    reader, saved, consumed = log.reader(LogOffsets.start()), [], 0
    while (batch := reader.next(step)) is not None:
        consumed += len(batch)
        saved.append((consumed, reader.offsets))
    erase_user(tmp_path, USER, FAR_MS)
    for consumed, offsets in saved[:: max(len(saved) // 40, 1)]:
        expected = [item for item in whole[consumed:] if user_of([item])[0] != USER]
        assert read_items(tmp_path, offsets) == expected
        assert EventLog(tmp_path).num_events(offsets) == len(expected)


def test_workers_keep_the_order_within_buckets(log: EventLog, tmp_path: Path) -> None:
    erase_user(tmp_path, USER, FAR_MS)
    whole = read_items(tmp_path)
    for rank in range(3):
        owned = np.arange(rank, 256, 3)
        batches = EventLog(tmp_path).read(LogOffsets.start(), owned, max_events=11)
        got = [int(item) for batch in batches for item in batch.item_id]
        assert got == [item for item in whole if user_bucket(user_of([item]))[0] % 3 == rank]


def test_a_reader_under_way_goes_on(log: EventLog, tmp_path: Path) -> None:
    whole = read_items(tmp_path)
    reader = log.reader(LogOffsets.start())
    first = reader.next(90)
    assert first is not None
    erase_user(tmp_path, USER, FAR_MS)
    rest: list[int] = []
    while (batch := reader.next(90)) is not None:
        rest += batch.item_id.tolist()
    # What was decoded before the erasure may still be handed out; nothing else is.
    others = [item for item in whole[90:] if user_of([item])[0] != USER]
    assert [item for item in rest if user_of([item])[0] != USER] == others
    assert set(rest) <= set(whole[90:])


def test_repeating_is_harmless_and_several_go_at_once(log: EventLog, tmp_path: Path) -> None:
    whole = read_items(tmp_path)
    until_ms_of = dict.fromkeys(range(0, 20, 2), FAR_MS)
    done = erase_users(tmp_path, until_ms_of)
    expected = [item for item in whole if user_of([item])[0] % 2]
    assert done.events == len(whole) - len(expected)
    assert erase_users(tmp_path, until_ms_of).events == 0
    assert read_items(tmp_path) == expected
    erase_users(tmp_path, dict.fromkeys(range(20), FAR_MS))
    assert read_items(tmp_path) == []
    assert EventLog(tmp_path).num_events() == 0
    assert EventLog(tmp_path).reader(LogOffsets.start()).next(5) is None


def test_erasures_at_once_all_count(log: EventLog, tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=erase_user, args=(tmp_path, user, FAR_MS)) for user in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(user_of(read_items(tmp_path)).tolist()) == set(range(6, 20))
    assert (columns_in_files(tmp_path, "bucket") == -1).sum() == 600 - len(read_items(tmp_path))


def test_appends_during_an_erasure_are_whole(log: EventLog, tmp_path: Path) -> None:
    others = some_events(30, seed=9)
    others = others.take(others.user_id != USER)
    number = log.last_segment()
    thread = threading.Thread(target=lambda: [EventLog(tmp_path).append(others) for _ in range(10)])
    thread.start()
    erase_user(tmp_path, USER, FAR_MS)
    thread.join()
    assert EventLog(tmp_path).last_segment() == number + 10
    assert EventLog(tmp_path).problems == []


class TestWhatComesLater:
    def test_readers_leave_old_events_out_that_come_again(
        self, log: EventLog, tmp_path: Path
    ) -> None:
        mine = user_events(log, USER)
        until_ms = int(mine.timestamp_ms.max())
        erase_user(tmp_path, USER, until_ms)
        log.append(mine)  # as `marm ingest --again` would
        later = mine.take(slice(0, 3))
        later = EventBatch(**{**vars(later), "timestamp_ms": later.timestamp_ms * 0 + until_ms + 1})
        log.append(later)
        again = EventLog(tmp_path)
        assert user_events(again, USER).event_key.tolist() == sorted(later.event_key.tolist())
        assert (user_of(read_items(tmp_path)) == USER).sum() == len(later)
        assert erase_forgotten(tmp_path).events == len(mine)
        assert USER in columns_in_files(tmp_path, "user_id")  # the later ones
        assert erase_forgotten(tmp_path).events == 0

    def test_a_repeated_report_stays_out_of_the_log(self, log: EventLog, tmp_path: Path) -> None:
        mine = user_events(log, USER)
        running = GroupCommitter(log, RecentReports.of_log(log))
        erase_user(tmp_path, USER, FAR_MS)
        restarted = GroupCommitter(EventLog(tmp_path), RecentReports.of_log(EventLog(tmp_path)))
        for committer in (running, restarted):
            assert committer.commit([mine]) == [[False] * len(mine)]
        assert EventLog(tmp_path).last_segment() == 4

    def test_a_running_reader_and_writer_hear_of_it(self, log: EventLog, tmp_path: Path) -> None:
        assert not log.forgets(user_events(log, USER)).any()
        mine = user_events(log, USER)
        ForgottenUsers(tmp_path).add({USER: FAR_MS})
        assert log.forgets(mine).all()


class TestBadInput:
    def test_there_must_be_a_log(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"there is no event log in .* give the log directory"):
            erase_user(tmp_path, USER, FAR_MS)
        assert list(tmp_path.iterdir()) == []

    def test_numbers_must_fit(self, log: EventLog, tmp_path: Path) -> None:
        for user_id, until_ms in ((2**63, 5), (5, -(2**63) - 1)):
            with pytest.raises(ValueError, match="integers of 64 bits"):
                erase_user(tmp_path, user_id, until_ms)
        assert not (tmp_path / FILE_NAME).exists()

    def test_an_unknown_user_is_no_error(self, log: EventLog, tmp_path: Path) -> None:
        assert erase_user(tmp_path, 12_345, FAR_MS).events == 0

    def test_a_damaged_file_is_named_and_the_rest_erased(
        self, log: EventLog, tmp_path: Path
    ) -> None:
        torn = segment_path(tmp_path / "segments", 2)
        torn.write_bytes(torn.read_bytes()[:-40])
        with pytest.raises(EraseError, match=r"000000000002.parquet: .*then forget the user again"):
            erase_user(tmp_path, USER, FAR_MS)
        assert (user_of(read_items(tmp_path)) != USER).all()
        assert not list((tmp_path / "segments").glob(".pending*"))

    def test_a_segment_that_an_ingest_is_committing_is_left(
        self, log: EventLog, tmp_path: Path
    ) -> None:
        os.link(segment_path(tmp_path / "segments", 1), tmp_path / "staged.parquet")
        with pytest.raises(EraseError, match="let `marm ingest` finish"):
            erase_user(tmp_path, USER, FAR_MS)
        assert (user_of(read_items(tmp_path)) != USER).all()  # nobody is shown them meanwhile
        (tmp_path / "staged.parquet").unlink()
        assert erase_forgotten(tmp_path).events > 0


class TestTheList:
    def test_the_latest_time_counts(self, tmp_path: Path) -> None:
        listed = ForgottenUsers(tmp_path)
        assert listed.until_ms_of() == {}
        listed.add({1: 50, -3: 10})
        listed.add({1: 20})
        other = ForgottenUsers(tmp_path)
        assert other.until_ms_of() == listed.until_ms_of() == {1: 50, -3: 10}
        users, times = np.array([1, 1, -3, 2, -3]), np.array([50, 51, 10, 0, 11])
        assert other.covers(users, times).tolist() == [True, False, True, False, False]

    def test_a_torn_line_counts_as_not_written(self, tmp_path: Path) -> None:
        ForgottenUsers(tmp_path).add({1: 50})
        with (tmp_path / FILE_NAME).open("ab") as file:
            file.write(b"\n12345 67")
        ForgottenUsers(tmp_path).add({2: 60})
        assert ForgottenUsers(tmp_path).until_ms_of() == {1: 50, 2: 60}

    def test_a_damaged_list_is_named(self, tmp_path: Path) -> None:
        (tmp_path / FILE_NAME).write_text("\n1 x;\n")
        with pytest.raises(ValueError, match=r"forgotten.txt must hold lines .* got b'1 x;'"):
            ForgottenUsers(tmp_path).until_ms_of()


def test_an_erased_file_is_refused_by_readers_of_the_first_format(
    log: EventLog, tmp_path: Path
) -> None:
    erase_user(tmp_path, USER, FAR_MS)
    path = segment_path(tmp_path / "segments", 1)
    described = pq.ParquetFile(path).schema_arrow.metadata[b"marm.event_log"]
    assert b'"version": 2' in described
    assert len(read_footer(path).erased) > 0
    with pytest.raises(SegmentError, match="missing"):
        read_footer(segment_path(tmp_path / "segments", 9))
