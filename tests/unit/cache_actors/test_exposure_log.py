from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serving_models import wait_until

from cache_actors.exposure_log.erase import erase_exposures
from cache_actors.exposure_log.reader import read_exposures, scan_exposures
from cache_actors.exposure_log.schema import (
    EXPOSURE_SCHEMA,
    Exposure,
    StageExposure,
    exposures_to_table,
)
from cache_actors.exposure_log.segments import (
    ExposureSegmentError,
    list_segments,
    write_segment,
)
from cache_actors.exposure_log.writer import ExposureWriter

DAY_MS = 86_400_000


def exposure(time_ms: int, user_id: int = 1, **more) -> Exposure:
    return Exposure(
        request_id=f"r{time_ms}",
        time_ms=time_ms,
        user_id=user_id,
        item_ids=np.array([3, 1], np.int64),
        scores=np.array([0.5, 0.25], np.float32),
        **more,
    )


def commit(directory: Path, *exposures: Exposure) -> Path:
    return write_segment(directory, exposures_to_table(exposures))


def paths(directory: Path) -> list[Path]:
    return [segment.path for segment in list_segments(directory)]


def test_a_row_comes_back_as_it_was_recorded(tmp_path):
    shown = exposure(
        5,
        user_id=2**63 - 1,
        latency_ms=12.5,
        degraded=("ranking: late",),
        holdout=True,
        overridden=True,
        stages={"ranking": StageExposure("depth", "l4", 7, 4), "retrieval": StageExposure(arm="a")},
    )
    commit(tmp_path, shown)
    (row,) = read_exposures(tmp_path).to_pylist()
    assert row == {
        "request_id": "r5",
        "time_ms": 5,
        "user_id": 2**63 - 1,
        "holdout": True,
        "overridden": True,
        "latency_ms": 12.5,
        "degraded": ["ranking: late"],
        "item_ids": [3, 1],
        "scores": [0.5, 0.25],
        "retrieval_experiment": "",
        "retrieval_arm": "a",
        "retrieval_version": None,
        "retrieval_depth": 0,
        "retrieval_shadow": False,
        "cascading_experiment": "",
        "cascading_arm": "",
        "cascading_version": None,
        "cascading_depth": 0,
        "cascading_shadow": False,
        "ranking_experiment": "depth",
        "ranking_arm": "l4",
        "ranking_version": 7,
        "ranking_depth": 4,
        "ranking_shadow": False,
    }


def test_a_home_without_exposures_has_none(tmp_path):
    rows = read_exposures(tmp_path / "nothing")
    assert rows.num_rows == 0
    assert rows.schema == EXPOSURE_SCHEMA


def test_times_select_rows_and_keep_other_segments_closed(tmp_path):
    commit(tmp_path, exposure(DAY_MS), exposure(10), exposure(20))
    far = commit(tmp_path, exposure(3 * DAY_MS))
    assert [path.parent.name for path in paths(tmp_path)] == ["1970-01-01", "1970-01-04"]
    far.write_bytes(b"damaged, but nobody looks")
    found = scan_exposures(tmp_path, since_ms=20, until_ms=DAY_MS + 1)
    assert found.rows.column("time_ms").to_pylist() == [20, DAY_MS]
    assert found.damaged == ()
    assert read_exposures(tmp_path, until_ms=20).column("time_ms").to_pylist() == [10]
    with pytest.raises(ValueError, match="since_ms must be at most until_ms=5, got 6"):
        read_exposures(tmp_path, since_ms=6, until_ms=5)


def test_half_written_files_are_not_read(tmp_path):
    segment = commit(tmp_path, exposure(1))
    whole = segment.read_bytes()
    (segment.parent / ".pending-0123").write_bytes(whole[: len(whole) // 2])
    (segment.parent / f"{segment.name}.tmp").write_bytes(whole)
    assert scan_exposures(tmp_path).rows.num_rows == 1
    assert scan_exposures(tmp_path).damaged == ()


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "foreign", "other columns"])
def test_damaged_segments_are_named_and_the_others_read(tmp_path, damage, caplog):
    bad = commit(tmp_path, exposure(1))
    commit(tmp_path, exposure(2))
    content = bytearray(bad.read_bytes())
    if damage == "torn":
        bad.write_bytes(content[:-50])
    elif damage == "flipped":
        content[30] ^= 0xFF
        bad.write_bytes(content)
    elif damage == "empty":
        bad.write_bytes(b"")
    elif damage == "foreign":
        pq.write_table(pa.table({"time_ms": [1]}), bad)
    else:
        table = pa.table({"time_ms": [1]}).replace_schema_metadata({"marm.exposure_log": "1"})
        pq.write_table(table, bad)
    with caplog.at_level(logging.WARNING):
        found = scan_exposures(tmp_path)
    assert found.rows.column("time_ms").to_pylist() == [2]
    assert found.damaged == (str(bad),)
    assert str(bad) in caplog.text


def test_a_deleted_segment_is_just_gone(tmp_path, monkeypatch):
    commit(tmp_path, exposure(1)).unlink()
    assert scan_exposures(tmp_path).damaged == ()


def test_the_writer_commits_when_enough_have_come(tmp_path):
    writer = ExposureWriter(tmp_path, max_rows=3, max_age_s=3600)
    for time_ms in range(7):
        assert writer.record(exposure(time_ms))
    wait_until(lambda: read_exposures(tmp_path).num_rows == 6)
    writer.close()
    assert read_exposures(tmp_path).column("time_ms").to_pylist() == list(range(7))
    assert len(paths(tmp_path)) == 3
    assert writer.counts.written == writer.counts.recorded == 7
    assert not writer.record(exposure(8))
    assert writer.counts.dropped == 1
    writer.close()


def test_the_writer_commits_when_time_has_passed(tmp_path):
    writer = ExposureWriter(tmp_path, max_rows=1000, max_age_s=0.05)
    writer.record(exposure(1))
    wait_until(lambda: read_exposures(tmp_path).num_rows == 1)
    writer.close()


def test_rows_wait_for_a_disk_that_fails_and_the_overflow_is_counted(tmp_path, caplog):
    blocked = tmp_path / "exposures"
    blocked.write_text("a file where the directory should be")
    writer = ExposureWriter(blocked, max_rows=2, max_age_s=0.02, max_buffered=4)
    taken = [writer.record(exposure(time_ms)) for time_ms in range(6)]
    assert taken == [True] * 4 + [False] * 2
    wait_until(lambda: "not written yet" in caplog.text)
    blocked.unlink()
    wait_until(lambda: writer.counts.written == 4)
    writer.close()
    assert read_exposures(blocked).column("time_ms").to_pylist() == [0, 1, 2, 3]
    assert writer.counts.dropped == 2
    assert "exposures were dropped so far" in caplog.text


def test_a_writer_that_closes_without_a_disk_says_what_is_lost(tmp_path, caplog):
    blocked = tmp_path / "exposures"
    blocked.write_text("")
    writer = ExposureWriter(blocked, max_age_s=3600)
    writer.record(exposure(1))
    writer.close()
    assert "1 exposures were not written" in caplog.text


def test_rows_that_do_not_fit_hold_up_nobody(tmp_path, caplog):
    writer = ExposureWriter(tmp_path, max_rows=1, max_age_s=3600)
    writer.record(exposure(1, user_id=2**70))
    writer.record(exposure(2))
    writer.close()
    assert read_exposures(tmp_path).column("time_ms").to_pylist() == [2]
    assert (writer.counts.written, writer.counts.dropped) == (1, 1)


def test_many_threads_and_writers_share_a_directory(tmp_path):
    writers = [ExposureWriter(tmp_path, max_rows=10, max_age_s=3600) for _ in range(2)]

    def record(start: int) -> None:
        for time_ms in range(start, start + 50):
            writers[time_ms % 2].record(exposure(time_ms))

    threads = [threading.Thread(target=record, args=(50 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for writer in writers:
        writer.close()
    assert read_exposures(tmp_path).column("time_ms").to_pylist() == list(range(200))


def test_a_buffer_smaller_than_a_segment_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_rows must be at least 1 and at most max_buffered=4"):
        ExposureWriter(tmp_path, max_rows=5, max_buffered=4)


def test_forgotten_users_are_gone_and_others_stay(tmp_path):
    commit(tmp_path, exposure(1, user_id=1), exposure(2, user_id=2), exposure(9, user_id=1))
    only_theirs = commit(tmp_path, exposure(3, user_id=1))
    untouched = commit(tmp_path, exposure(4, user_id=3)).read_bytes()
    assert erase_exposures(tmp_path, {1: 5}) == 2
    rows = read_exposures(tmp_path)
    assert rows.select(["time_ms", "user_id"]).to_pylist() == [
        {"time_ms": 2, "user_id": 2},
        {"time_ms": 4, "user_id": 3},
        {"time_ms": 9, "user_id": 1},
    ]
    assert not only_theirs.exists()
    assert untouched in [path.read_bytes() for path in paths(tmp_path)]
    assert erase_exposures(tmp_path, {1: 5}) == 0


def test_a_damaged_segment_is_told_after_the_others_were_cleaned(tmp_path):
    commit(tmp_path, exposure(1)).write_bytes(b"torn")
    commit(tmp_path, exposure(2))
    with pytest.raises(ExposureSegmentError, match=r"1 exposures were removed, but some segments"):
        erase_exposures(tmp_path, {1: 5})
    assert read_exposures(tmp_path).num_rows == 0
