from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.event_log.schema import events_to_table
from cache_actors.event_log.segments import METADATA_KEY
from marm.events import TASKS, EventBatch


def numbered_events(keys: range) -> EventBatch:
    """Events whose key, timestamp and item are the same number, of many users."""
    numbers = np.array(keys)
    zeros = np.zeros(len(numbers), np.int64)
    return EventBatch(
        user_id=numbers % 37,
        item_id=numbers,
        timestamp_ms=numbers,
        event_key=numbers.astype(np.uint64),
        author_id=zeros,
        tag_id=zeros,
        duration_ms=zeros,
        context_id=zeros.astype(np.int32),
        labels=np.zeros((len(numbers), len(TASKS)), np.float32),
    )


def keys_of(log: EventLog, max_events: int = 10) -> list[int]:
    return [
        int(key)
        for batch in log.read(LogOffsets.start(), max_events=max_events)
        for key in batch.event_key
    ]


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def cut_in_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip_a_byte_of_data(path: Path) -> None:
    content = bytearray(path.read_bytes())
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(0).column(2)
        end = column.data_page_offset + column.total_compressed_size
    content[end - 3] ^= 0xFF
    path.write_bytes(content)


def replace_by_text(path: Path) -> None:
    path.write_text("user,item\n1,2\n" * 20)


def replace_by_foreign_parquet(path: Path) -> None:
    pq.write_table(pa.table({"user_id": [1, 2], "item_id": [3, 4]}), path)


def replace_by_own_columns_without_metadata(path: Path) -> None:
    pq.write_table(events_to_table(numbered_events(range(5))), path)


def drop_a_column(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["tag_id"]), path)


def drop_rows(path: Path) -> None:
    pq.write_table(pq.read_table(path).slice(1), path)


def set_metadata(path: Path, content: bytes) -> None:
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: content}), path)


def raise_format_version(path: Path) -> None:
    set_metadata(path, b'{"version": 99}')


def garble_metadata(path: Path) -> None:
    set_metadata(path, b'{"version": 1, "bucket_rows": {"900": 1}, "first_rows": {}}')


def replace_by_empty_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [
    (make_empty, "the file is empty"),
    (tear, "torn or not Parquet"),
    (cut_in_half, "torn or not Parquet"),
    (flip_a_byte_of_data, "torn or not Parquet"),
    (replace_by_text, "torn or not Parquet"),
    (replace_by_foreign_parquet, "did not write"),
    (replace_by_own_columns_without_metadata, "did not write"),
    (drop_a_column, "wrong schema"),
    (drop_rows, "metadata promises"),
    (raise_format_version, "format version must be 1 or 2, got 99"),
    (garble_metadata, "unreadable metadata"),
    (replace_by_empty_directory, "without parts"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_a_damaged_segment_is_named_once_and_skipped(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    writer = EventLog(tmp_path)
    for start in (0, 20, 40):
        writer.append(numbered_events(range(start, start + 20)))
    damage(tmp_path / "segments" / "000000000002.parquet")
    log = EventLog(tmp_path)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert keys_of(log) == [*range(20), *range(40, 60)]
    (problem,) = log.problems
    assert problem.startswith("000000000002.parquet: ")
    assert reason in problem
    assert [record.getMessage() for record in caplog.records].count(
        f"event log {tmp_path / 'segments'}: {problem}"
    ) == 1
    assert log.append(numbered_events(range(60, 70))) == 4
    assert keys_of(log) == [*range(20), *range(40, 70)]


def test_resuming_after_a_damaged_segment_loses_nothing(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    for start in (0, 20, 40):
        log.append(numbered_events(range(start, start + 20)))
    reader = log.reader(LogOffsets.start())
    first = reader.next(25)
    assert first is not None
    tear(tmp_path / "segments" / "000000000002.parquet")
    rest = EventBatch.concat(list(EventLog(tmp_path).read(reader.offsets)))
    assert rest.event_key.tolist() == list(range(40, 60))


def test_resuming_inside_a_deleted_segment_reads_the_following_ones_whole(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    for start in (0, 20, 40):
        log.append(numbered_events(range(start, start + 20)))
    reader = log.reader(LogOffsets.start())
    reader.next(35)
    (tmp_path / "segments" / "000000000002.parquet").unlink()
    rest = EventBatch.concat(list(EventLog(tmp_path).read(reader.offsets)))
    assert rest.event_key.tolist() == list(range(40, 60))


@pytest.mark.parametrize("lost_part", [0, 1, 2])
@pytest.mark.parametrize("batches_before", [0, 1, 3])
def test_a_lost_part_of_a_huge_append_costs_only_its_own_events(
    tmp_path: Path, lost_part: int, batches_before: int
) -> None:
    log = EventLog(tmp_path, max_segment_events=20)
    log.append(numbered_events(range(60)))
    reader = log.reader(LogOffsets.start())
    for _ in range(batches_before):
        reader.next(7)
    part = f"00000{lost_part}-of-000003.parquet"
    (tmp_path / "segments" / "000000000001.parquet" / part).unlink()
    reopened = EventLog(tmp_path)
    resumed = reopened.reader(reader.offsets)
    got = []
    while (batch := resumed.next(4)) is not None:
        got += batch.event_key.tolist()
        # Offsets stay exact beyond the loss: a further resume repeats and loses nothing.
        resumed = reopened.reader(LogOffsets.from_json(resumed.offsets.to_json()))
    lost = range(20 * lost_part, 20 * lost_part + 20)
    assert got == [key for key in range(7 * batches_before, 60) if key not in lost]
    assert reopened.problems == [f"000000000001.parquet/{part}: the file is missing; skipped"]


def test_foreign_names_are_reported_and_pending_ones_are_not(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append(numbered_events(range(5)))
    (tmp_path / "segments" / "notes.txt").write_text("hello")
    (tmp_path / "segments" / "copy-of-1.parquet").write_bytes(b"PAR1")
    (tmp_path / "segments" / ".pending-0123").write_bytes(b"half")
    assert keys_of(log) == list(range(5))
    assert log.problems == [
        "copy-of-1.parquet: not a segment's name; skipped",
        "notes.txt: not a segment's name; skipped",
    ]


def test_removed_segments_in_the_middle_are_reported_and_passed(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    for start in range(0, 50, 10):
        log.append(numbered_events(range(start, start + 10)))
    for number in (2, 3):
        (tmp_path / "segments" / f"{number:012d}.parquet").unlink()
    reopened = EventLog(tmp_path)
    assert keys_of(reopened) == [*range(10), *range(30, 50)]
    assert reopened.problems == ["segments 2 to 3 are missing"]
    assert reopened.append(numbered_events(range(50, 60))) == 6


def test_old_segments_may_be_deleted_from_the_front(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    for start in range(0, 30, 10):
        log.append(numbered_events(range(start, start + 10)))
    (tmp_path / "segments" / "000000000001.parquet").unlink()
    reopened = EventLog(tmp_path)
    assert keys_of(reopened) == list(range(10, 30))
    assert reopened.problems == []


@pytest.mark.parametrize("hint", [None, "", "1", "garbage"])
def test_a_writer_that_idled_never_reuses_a_number(tmp_path: Path, hint: str | None) -> None:
    idle = EventLog(tmp_path)
    idle.append(numbered_events(range(5)))
    busy = EventLog(tmp_path)
    for start in range(5, 50, 5):
        busy.append(numbered_events(range(start, start + 5)))
    segments = tmp_path / "segments"
    if hint is None:  # with the hint, a log that lost its old segments is no riddle
        for number in range(1, 9):
            (segments / f"{number:012d}.parquet").unlink()
    else:  # without it, the log is probed
        (segments / ".last").write_text(hint)
    assert idle.append(numbered_events(range(50, 55))) == 11
    assert EventLog(tmp_path).last_segment() == 11


def test_a_failed_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog(tmp_path, max_segment_events=10)
    log.append(numbered_events(range(5)))

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    for size in (5, 25):
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", no_space)
            with pytest.raises(OSError, match="No space left"):
                log.append(numbered_events(range(5, 5 + size)))
    left = {path.name for path in (tmp_path / "segments").iterdir()}
    assert left == {"000000000001.parquet", ".last"}
    assert log.append(numbered_events(range(5, 10))) == 2
