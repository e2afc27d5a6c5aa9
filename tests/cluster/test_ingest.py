"""Ingest through a real Ray Data pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache_actors.event_log.catalog import read_catalog
from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from marm.events import TASKS, EventBatch
from train.data.column_map import open_parquet
from train.data.ingest import ingest, sequence
from train.data.ingest_report import IngestError, IngestReport
from train.data.ray_prepare import staged_in_order
from train.data.source import stage
from train.data.staged_rows import SORT_KEY

pytestmark = pytest.mark.cluster

SHARED_DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
T0_S = 1_600_000_000


def events_in(home: Path) -> EventBatch:
    log = EventLog(home / "log")
    events = EventBatch.concat(list(log.read(LogOffsets.start(), max_events=1 << 20)))
    assert log.problems == []
    return events


def assert_same(left: EventBatch, right: EventBatch) -> None:
    for name in left.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def write_untidy_log(directory: Path) -> None:
    """Several files with small row groups; duplicates, ties, nulls and negative ids; no order."""
    directory.mkdir()
    rng = np.random.default_rng(5)
    for part in range(3):
        count = 4_000
        pq.write_table(
            pa.table(
                {
                    "user_id": pa.array(rng.integers(-1, 60, count), mask=rng.random(count) < 0.01),
                    "item_id": rng.integers(0, 100, count),
                    "timestamp": T0_S + rng.integers(0, 900, count),
                    "tag_id": rng.integers(0, 9, count),
                    "label": rng.integers(0, 2, count),
                }
            ),
            directory / f"part-{part}.parquet",
            row_group_size=700,
        )


def test_ingest_equals_one_process_without_ray(ray_cluster: None, tmp_path: Path) -> None:
    write_untidy_log(tmp_path / "in")
    source = open_parquet(str(tmp_path / "in"), {"long_view": "label"})
    assert len(source.fragments) == 18
    rows = pa.concat_tables([stage(part, source.layout, "s") for part in source.fragments])
    plain = IngestReport("parquet", [])
    in_order = rows.sort_by([(name, "ascending") for name in SORT_KEY])
    expected = EventBatch.concat(list(sequence([in_order], plain)))
    told: list[str] = []
    report = ingest(
        tmp_path / "home",
        "parquet",
        str(tmp_path / "in"),
        {"long_view": "label"},
        progress=lambda stage, amount: told.append(stage),
    )
    stored = events_in(tmp_path / "home")
    assert_same(stored, expected.take(np.lexsort((expected.event_key, expected.timestamp_ms))))
    assert report.rows_kept == len(stored)
    assert report.rows_read == 12_000 == report.rows_kept + sum(report.dropped.values())
    assert (report.dropped, report.repaired) == (plain.dropped, plain.repaired)
    assert set(report.dropped) == {"null_user_id", "negative_user_id", "duplicate"}
    assert report.items_added == len(read_catalog(tmp_path / "home" / "log")) == 100
    assert set(told) == {"fingerprint", "prepare", "write", "commit"}
    # The same from many blocks in parallel.
    num_bytes = sum(fragment.num_bytes for fragment in source.fragments)
    spread = staged_in_order(source, task_bytes=num_bytes // 4)
    assert_same(EventBatch.concat(list(sequence(spread, IngestReport("parquet", [])))), expected)


def test_the_same_file_again_only_when_asked(ray_cluster: None, tmp_path: Path) -> None:
    ratings = tmp_path / "ratings.dat"
    ratings.write_text("".join(f"{n % 7}::{n}::{n % 5 + 1}::{T0_S + n // 3}\n" for n in range(90)))
    (tmp_path / "movies.dat").write_text("".join(f"{n}::T::Comedy|War\n" for n in range(90)))
    home = tmp_path / "home"
    first = ingest(home, "movielens", str(tmp_path))
    assert (first.rows_kept, first.items_added) == (90, 90)
    moved = tmp_path / "elsewhere.dat"
    ratings.rename(moved)
    with pytest.raises(IngestError, match="already in the log"):
        ingest(home, "movielens", str(moved))
    assert len(events_in(home)) == 90
    twice = ingest(home, "movielens", str(moved), again=True)
    assert (twice.rows_kept, twice.items_added) == (90, 0)
    assert len(events_in(home)) == 180


def test_a_failed_ingest_leaves_everything_as_it_was(ray_cluster: None, tmp_path: Path) -> None:
    home = tmp_path / "home"
    good = tmp_path / "ratings.dat"
    good.write_text(f"1::1::5::{T0_S}\n")
    ingest(home, "movielens", str(good))
    before = sorted(path.relative_to(home) for path in home.rglob("*"))
    directory = tmp_path / "log"
    write_untidy_log(directory)
    damaged = directory / "part-2.parquet"
    data = bytearray(damaged.read_bytes())
    data[4:600] = b"\xff" * 596
    damaged.write_bytes(bytes(data))
    with pytest.raises(IngestError, match=r"part-2\.parquet is damaged"):
        ingest(home, "parquet", str(directory), {"like": "label"})
    useless = tmp_path / "useless.parquet"
    pq.write_table(
        pa.table({"user_id": [-1], "item_id": [1], "timestamp": [T0_S], "like": [1]}), useless
    )
    with pytest.raises(IngestError, match=r"none of the 1 rows .* \(1 negative_user_id\)"):
        ingest(home, "parquet", str(useless))
    assert sorted(path.relative_to(home) for path in home.rglob("*")) == before
    assert len(events_in(home)) == 1


def test_a_real_log_keeps_every_rating(ray_cluster: None, tmp_path: Path) -> None:
    path = SHARED_DATA / "ml_latest_small.parquet"
    if not path.is_file():
        pytest.skip(f"needs {path.name}")
    report = ingest(tmp_path, "parquet", str(path), {"long_view": "label", "tag_id": "genre"})
    assert (report.rows_read, report.rows_kept, report.dropped) == (100_836, 100_836, {})
    source = pq.read_table(path, columns=["user_id", "item_id", "seq", "label"]).to_pandas()
    source = source.sort_values(["user_id", "seq"])
    events = events_in(tmp_path)
    order = np.lexsort((events.timestamp_ms, events.user_id))
    np.testing.assert_array_equal(events.user_id[order], source["user_id"])
    np.testing.assert_array_equal(events.item_id[order], source["item_id"])
    np.testing.assert_array_equal(
        events.labels[order, TASKS.index("long_view")], source["label"].astype(np.float32)
    )
