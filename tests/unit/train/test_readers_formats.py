"""The published layouts, written small: every file format a reader claims to read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from marm.events import TASKS, EventBatch
from marm.items import ItemCatalog
from train.data.column_map import parse_column_map
from train.data.fragments import CsvLayout, csv_fragments, read_csv
from train.data.ingest import open_source_of, sequence
from train.data.ingest_report import IngestError, IngestReport
from train.data.movielens import GENRES, genre_tag
from train.data.parse_columns import stable_id
from train.data.seen_items import SeenItems
from train.data.source import Source, stage
from train.data.staged_rows import SORT_KEY

T0_S = 978_300_760
KUAIRAND_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,"
    "is_hate,long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,"
    "is_profile_enter,is_rand,tab"
)


def events_of(source: Source) -> tuple[EventBatch, IngestReport]:
    """What Ray Data does, in this process."""
    tables = [stage(part, source.layout, source.timestamp_unit) for part in source.fragments]
    rows = pa.concat_tables(tables).sort_by([(name, "ascending") for name in SORT_KEY])
    report = IngestReport(source.format, [])
    seen = SeenItems(source.items)
    batches = [seen.complete(batch) for batch in sequence([rows], report)]
    return EventBatch.concat(batches), report


def label(events: EventBatch, task: str) -> list[float]:
    return events.labels[:, TASKS.index(task)].tolist()


def test_movielens_dat(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text(
        f"1::1193::5::{T0_S}\n1::661::3::{T0_S}\nbroken line\n2::1193::4::{T0_S - 10}\n"
        f"2::::4::{T0_S}\n-2::5::4::{T0_S}\n2::5::good::{T0_S}\n"
    )
    (tmp_path / "movies.dat").write_bytes(
        "1193::Misérables: film (1998)::Drama|War\n661::Toy::Children's|Comedy\n".encode("latin-1")
    )
    source = open_source_of("movielens", str(tmp_path), {})
    events, report = events_of(source)
    assert events.user_id.tolist() == [2, 1, 1]
    assert events.item_id.tolist() == [1193, 1193, 661]
    expected_ms = np.array([T0_S - 10, T0_S, T0_S]) * 1000 + [0, 0, 1]
    assert events.timestamp_ms.tolist() == expected_ms.tolist()
    assert label(events, "long_view") == [1, 1, 0]
    assert label(events, "like") == [0, 1, 0]
    assert np.isnan(label(events, "click")).all()
    drama, children = GENRES.index("Drama") + 1, GENRES.index("Children") + 1
    assert events.tag_id.tolist() == [drama, drama, children]
    assert report.rows_read == 7
    assert report.dropped == {
        "malformed_row": 1,
        "null_item_id": 1,
        "negative_user_id": 1,
        "no_label": 1,
    }


def test_movielens_csv_and_its_half_ratings(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text(
        f"userId,movieId,rating,timestamp\r\n1,2,4.5,{T0_S}\r\n1,3,3.5,{T0_S + 1}\r\n"
    )
    (tmp_path / "movies.csv").write_text(
        'movieId,title,genres\n2,"Jumanji, or (1995)",Adventure|Comedy\n3,X,(no genres listed)\n'
    )
    source = open_source_of("movielens", str(tmp_path / "ratings.csv"), {})
    events, report = events_of(source)
    assert label(events, "long_view") == [1, 0]
    assert label(events, "like") == [0, 0]
    assert events.tag_id.tolist() == [GENRES.index("Adventure") + 1, 0]
    assert report.dropped == {}
    assert genre_tag("Slapstick|War") == stable_id("Slapstick")


def test_movielens_without_movies_says_so(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text(f"1::2::5::{T0_S}\n")
    source = open_source_of("movielens", str(tmp_path), {})
    assert "items have no tag" in source.notes[0]
    assert len(events_of(source)[0]) == 1


def write_kuairand(directory: Path) -> None:
    data = directory / "KuaiRand-Pure" / "data"
    data.mkdir(parents=True)
    t0_ms = T0_S * 1000
    (data / "log_standard_4_08_to_4_21_pure.csv").write_text(
        f"{KUAIRAND_HEADER}\n"
        f"0,7,20220408,1200,{t0_ms},1,0,0,0,0,0,1,20500,30000,0,0,0,0,1\n"
        f"0,8,20220408,1200,{t0_ms + 5},0,0,0,0,0,0,0,100,9000,0,0,0,0,0\n"
    )
    (data / "log_standard_4_22_to_5_08_pure.csv").write_text(
        f"{KUAIRAND_HEADER}\n5,7,20220422,1200,{t0_ms + 9},1,1,1,1,1,0,1,40000,30000,0,0,0,0,4\n"
    )
    (data / "log_random_4_22_to_5_08_pure.csv").write_text(
        f"{KUAIRAND_HEADER}\n5,9,20220422,1200,{t0_ms + 7},0,0,0,0,0,0,0,0,30000,0,0,0,1,4\n"
    )
    (data / "video_features_basic_pure.csv").write_text(
        "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,"
        "server_width,server_height,music_id,music_type,tag\n"
        '7,0,NORMAL,2022-01-01,ShortImport,0.0,30000.0,720,1280,1,9.0,"0,39"\n'
        "8,11,NORMAL,2022-01-01,ShortImport,0.0,9000.0,720,1280,1,9.0,12\n"
        "10,12,NORMAL,2022-01-01,ShortImport,0.0,,720,1280,1,9.0,\n"
    )


def test_kuairand_directory_and_glob(tmp_path: Path) -> None:
    write_kuairand(tmp_path)
    source = open_source_of("kuairand", str(tmp_path), {})
    events, report = events_of(source)
    assert events.user_id.tolist() == [0, 0, 5]
    assert events.context_id.tolist() == [2, 1, 5]
    assert events.author_id.tolist() == [1, 12, 1]
    assert events.tag_id.tolist() == [1, 13, 1]
    assert events.duration_ms.tolist() == [30_000, 9_000, 30_000]
    assert label(events, "watch_time") == pytest.approx([20.5, 0.1, 40.0])
    for task in ("like", "comment", "forward", "follow"):
        assert label(events, task) == [0, 0, 1]
    assert report.rows_read == 3
    assert ItemCatalog(source.items).lookup(np.array([10])).author_id.tolist() == [13]
    both = open_source_of("kuairand", str(tmp_path / "*" / "data" / "log_*.csv"), {})
    assert events_of(both)[0].item_id.tolist() == [7, 8, 9, 7]


def test_kuairand_without_a_column(tmp_path: Path) -> None:
    (tmp_path / "log_standard_x.csv").write_text("user_id,video_id,time_ms\n1,2,3\n")
    with pytest.raises(IngestError, match=r"no column 'is_click' .* columns are user_id, video_id"):
        open_source_of("kuairand", str(tmp_path), {})


def write_parquet(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def test_parquet_with_a_column_map_over_several_files(tmp_path: Path) -> None:
    for part in (2, 1):
        write_parquet(
            tmp_path / f"part-{part}.parquet",
            who=[part, part, 3],
            item_id=[1, 2, 3],
            at=pa.array([T0_S + part, T0_S + part, None]),
            good=[True, False, True],
            genre=pa.array(["War", None, "Drama"]).dictionary_encode(),
            watch_time_ms=[1000, None, 3000],
        )
    column_map = parse_column_map(["user_id=who", "timestamp=at", "long_view=good", "tag_id=genre"])
    events, report = events_of(open_source_of("parquet", str(tmp_path), column_map))
    assert events.user_id.tolist() == [1, 1, 2, 2]
    assert events.item_id.tolist() == [1, 2, 1, 2]
    assert label(events, "long_view") == [1, 0, 1, 0]
    assert events.labels[::2, TASKS.index("watch_time")].tolist() == [1, 1]
    assert events.tag_id.tolist() == [stable_id("War"), 0] * 2
    assert report.dropped == {"null_timestamp": 2}
    assert report.repaired == {"timestamp_moved_after_a_tie": 2}


def test_parquet_errors_name_what_to_pass(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "log.parquet", user=[1], item_id=[2], ts=[3], stars=[4])
    with pytest.raises(IngestError, match="--map user_id=COLUMN --map timestamp=COLUMN") as raised:
        open_source_of("parquet", str(path), {})
    assert "its columns are user, item_id, ts, stars" in str(raised.value)
    base = {"user_id": "user", "timestamp": "ts"}
    with pytest.raises(IngestError, match="no label"):
        open_source_of("parquet", str(path), base)
    with pytest.raises(IngestError, match="must be 0 or 1"):
        open_source_of("parquet", str(path), {**base, "long_view": "stars"})
    with pytest.raises(IngestError, match="unknown field stars"):
        open_source_of("parquet", str(path), {**base, "stars": "stars"})
    with pytest.raises(IngestError, match="timestamp unit"):
        open_source_of("parquet", str(path), {**base, "like": "stars"}, "hours")


def test_columns_of_a_wrong_type_are_refused(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "log.parquet", user_id=[[1]], item_id=[2], timestamp=[3], like=["yes"]
    )
    with pytest.raises(IngestError, match="user_id must be integers"):
        open_source_of("parquet", str(path), {})
    path = write_parquet(
        tmp_path / "log.parquet", user_id=[1], item_id=[2], timestamp=[3], like=["yes"]
    )
    with pytest.raises(IngestError, match="like must be 0 or 1"):
        open_source_of("parquet", str(path), {})


def test_files_that_are_not_there_or_not_readable(tmp_path: Path) -> None:
    with pytest.raises(IngestError, match="no such file"):
        open_source_of("parquet", str(tmp_path / "nothing*.parquet"), {})
    with pytest.raises(IngestError, match=r"found no ratings.\* in the directory"):
        open_source_of("movielens", str(tmp_path), {})
    garbage = tmp_path / "x.parquet"
    garbage.write_bytes(b"not parquet at all")
    with pytest.raises(IngestError, match="not a readable Parquet file"):
        open_source_of("parquet", str(garbage), {})
    (tmp_path / "ratings.csv").write_text("")
    with pytest.raises(IngestError, match="empty"):
        open_source_of("movielens", str(tmp_path), {})
    (tmp_path / "ratings.dat").write_text("a,b,c\n")
    with pytest.raises(IngestError, match="expected one ratings"):
        open_source_of("movielens", str(tmp_path), {})
    with pytest.raises(IngestError, match="no '::'"):
        open_source_of("movielens", str(tmp_path / "ratings.dat"), {})
    with pytest.raises(IngestError, match="format must be one of"):
        open_source_of("excel", str(tmp_path), {})
    with pytest.raises(IngestError, match="--map"):
        open_source_of("movielens", str(tmp_path), {"user_id": "x"})
    for bad in (["user_id"], ["=x"], ["a=1", "a=2"]):
        with pytest.raises(IngestError, match="--map"):
            parse_column_map(bad)


def test_damage_inside_a_parquet_file_comes_back_as_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << 60, 5_000)
    pq.write_table(
        pa.table({"user_id": values, "item_id": values, "timestamp": values, "like": values % 2}),
        path,
        write_page_checksum=True,
    )
    source = open_source_of("parquet", str(path), {})
    data = bytearray(path.read_bytes())
    data[2_000] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(IngestError, match=r"log\.parquet is damaged"):
        events_of(source)


@pytest.mark.parametrize("fragment_bytes", [1, 10, 1000])
def test_csv_fragments_add_up_to_the_file(tmp_path: Path, fragment_bytes: int) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b\n" + "".join(f"{n},{n * n}\n" for n in range(50)) + "50,2500")
    parts = csv_fragments([path, path], has_header=True, fragment_bytes=fragment_bytes)
    layout = CsvLayout(",", ("a", "b"), ("b", "a"))
    read = [read_csv(part, layout).table for part in parts]
    expected = list(range(51)) * 2
    assert pa.concat_tables(read).column("a").to_pylist() == expected
    assert [part.index for part in parts] == list(range(len(parts)))


def test_one_odd_value_does_not_spoil_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "ratings.csv"
    # Far enough from the start that the column already counts as one of integers.
    lines = [f"{n},{n},5,{T0_S + n}" for n in range(200_000)]
    lines[150_000] = f"abc,{1},5,{T0_S}"
    path.write_text("userId,movieId,rating,timestamp\n" + "\n".join(lines))
    events, report = events_of(open_source_of("movielens", str(path), {}))
    assert len(events) == 199_999
    assert report.dropped == {"malformed_user_id": 1}
