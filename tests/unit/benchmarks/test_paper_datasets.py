"""Logs for the experiments: Parquet copies, published layouts and the simulated world."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.paper.datasets import (
    LONG_WORLD,
    Dataset,
    item_mean_floor,
    load_dataset,
    parse_world,
    users_with_both_labels,
)
from benchmarks.paper.statistics import user_aucs
from benchmarks.paper.trial import Predictions
from benchmarks.paper.trial_pool import read_dataset, write_dataset
from marm.events import TASKS
from train.data.ingest_report import IngestError

T0_S = 1_650_000_000


def label(dataset: Dataset, task: str) -> list[float]:
    return dataset.events.labels[:, TASKS.index(task)].tolist()


@pytest.fixture
def movielens(tmp_path: Path) -> Path:
    """Two users. Rows of user 1 share a second, and the file has them out of order."""
    path = tmp_path / "ratings.parquet"
    columns = {
        "user_id": [2, 1, 1, 1, 2],
        "item_id": [50, 12, 11, 10, 51],
        "timestamp": [T0_S - 5, T0_S, T0_S, T0_S, T0_S + 9],
        "label": pa.array([1.0, 0.0, 1.0, 1.0, 0.0], pa.float32()),
        "seq": pa.array([0, 2, 1, 0, 1], pa.int32()),
        "genre": ["Drama", "Action", "Action", "Drama", None],
    }
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def kuairand(tmp_path: Path) -> Path:
    """The clocks of the parts overlap: a history row of user 3 is later than a log row of 4."""
    path = tmp_path / "kuairand.parquet"
    columns = {
        "user_id": [3, 4, 3, 4],
        "item_id": [7, 7, 8, 9],
        "timestamp": [T0_S + 2, T0_S + 1, T0_S + 3, T0_S],
        "label": [1.0, 0.0, 1.0, 1.0],
        "like": [0.0, 0.0, 1.0, 0.0],
        "is_click": [None, 1.0, 1.0, None],
        "play_time_ms": [None, 1500.0, 61_802.0, None],
        "duration_ms": [30_960.0, None, 49_866.0, 6_133.0],
        "tab": [None, 0.0, 4.0, None],
        "part": pa.array(["history", "log", "log", "history"], pa.large_string()),
        "seq": [0, 1, 1, 0],
        "author_id": [0, 0, 38_589, 17],
        "tag": pa.array(["1", "1", "39,68", "unknown"], pa.large_string()),
        "video_type": ["NORMAL"] * 4,
    }
    pq.write_table(pa.table(columns), path)
    return path


def test_movielens_copy(movielens: Path) -> None:
    dataset = load_dataset(str(movielens))
    events = dataset.events
    assert events.user_id.tolist() == [2, 1, 1, 1, 2]
    assert events.item_id.tolist() == [50, 10, 11, 12, 51]  # ties in the order of seq
    start = 1000 * T0_S
    assert (events.timestamp_ms - start).tolist() == [-5000, 0, 1, 2, 9000]
    assert label(dataset, "long_view") == [1, 1, 1, 0, 0]
    assert np.isnan(label(dataset, "click")).all()
    assert events.tag_id[0] == events.tag_id[1] != events.tag_id[2] != 0
    assert events.tag_id[4] == 0
    assert dataset.recency == ("distance",)
    assert dataset.features == ("item", "tag")
    assert dataset.test.tolist() == [False] * 4 + [True]
    assert dataset.tuning.tolist() == [False] * 3 + [True, False]


def test_movielens_copy_needs_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"user_id": [1], "item_id": [2], "timestamp": [3]}), path)
    with pytest.raises(IngestError, match="no column 'label'"):
        load_dataset(str(path))


def test_kuairand_copy(kuairand: Path) -> None:
    dataset = load_dataset(str(kuairand))
    events = dataset.events
    assert events.user_id.tolist() == [4, 4, 3, 3]
    assert dataset.test.tolist() == [False, True, False, True]
    assert dataset.window("test").tolist() == [False, True, False, True]
    assert events.context_id.tolist() == [0, 1, 0, 5]
    assert events.author_id.tolist() == [18, 1, 1, 38_590]
    assert events.tag_id.tolist() == [0, 2, 2, 40]
    assert events.duration_ms.tolist() == [6133, 0, 30_960, 49_866]
    np.testing.assert_equal(label(dataset, "click"), [np.nan, 1, np.nan, 1])
    np.testing.assert_allclose(label(dataset, "watch_time"), [np.nan, 1.5, np.nan, 61.802], 1e-6)
    assert label(dataset, "like") == [0, 0, 0, 1]
    assert len(np.unique(events.event_key)) == 4


def test_published_layouts(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text(
        f"userId,movieId,rating,timestamp\n1,5,4.5,{T0_S}\n1,6,3.0,{T0_S}\n"
    )
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n5,A (1999),Drama|War\n")
    dataset = load_dataset(str(tmp_path / "ratings.csv"))
    assert dataset.events.item_id.tolist() == [5, 6]
    assert np.diff(dataset.events.timestamp_ms).tolist() == [1]
    assert label(dataset, "long_view") == [1, 0]
    assert dataset.events.tag_id[0] > 0
    log = tmp_path / "kuairand"
    log.mkdir()
    (log / "log_standard_4_22.csv").write_text(
        "user_id,video_id,time_ms,is_click,long_view,is_like,is_comment,is_forward,is_follow,"
        f"play_time_ms,duration_ms,tab\n1,9,{T0_S}000,1,1,0,0,0,0,5000,9000,0\n"
    )
    assert load_dataset(str(log)).events.context_id.tolist() == [1]


def test_world_takes_settings() -> None:
    config = parse_world("world:num_users=20,num_events=300,quality_strength=0.5")
    assert config == replace(LONG_WORLD, num_users=20, num_events=300, quality_strength=0.5)
    dataset = load_dataset("world:num_users=20,num_items=50,num_events=300")
    assert len(dataset) == 300
    assert dataset.test.sum() == dataset.tuning.sum() == 60
    assert parse_world("world") == LONG_WORLD
    with pytest.raises(IngestError, match="no setting 'colour'"):
        parse_world("world:colour=red")
    with pytest.raises(IngestError, match="num_users of a world is of type int, got 'many'"):
        parse_world("world:num_users=many")


def test_a_limit_keeps_the_first_events(movielens: Path, kuairand: Path) -> None:
    dataset = load_dataset(str(movielens), limit=3)
    assert dataset.events.item_id.tolist() == [50, 10, 11]
    assert dataset.test.tolist() == [False, False, True]
    assert load_dataset(str(kuairand), limit=10).test.sum() == 2  # nothing to cut: as it was


def test_fingerprints_tell_data_sets_apart(movielens: Path, kuairand: Path) -> None:
    dataset = load_dataset(str(movielens))
    assert dataset.fingerprint() == load_dataset(str(movielens)).fingerprint()
    others = [
        load_dataset(str(kuairand)),
        dataset.first(4),
        replace(dataset, recency=()),
        replace(dataset, test=~dataset.test),
    ]
    assert len({one.fingerprint() for one in (dataset, *others)}) == 5


def test_floor_is_the_running_item_mean() -> None:
    dataset = load_dataset("world:num_users=30,num_items=40,num_events=2000,quality_strength=3")
    floor = item_mean_floor(dataset)
    assert floor["gauc"] > 0.6
    # The floor is of the same window, and sees no label of it too early: with labels that do not
    # depend on the item it is a coin.
    rng = np.random.default_rng(0)
    labels = dataset.events.labels.copy()
    labels[:, TASKS.index("long_view")] = rng.integers(0, 2, len(dataset))
    random = replace(dataset, events=replace(dataset.events, labels=labels))
    assert abs(item_mean_floor(random)["gauc"] - 0.5) < 0.06


def test_unobserved_labels_are_not_evaluated(movielens: Path) -> None:
    dataset = load_dataset(str(movielens))
    labels = dataset.events.labels.copy()
    labels[-1] = np.nan
    unknown = replace(dataset, events=replace(dataset.events, labels=labels))
    assert not unknown.window("test").any()
    with pytest.raises(ValueError, match="a window is one of test, tuning, got 'dev'"):
        dataset.window("dev")


def test_other_processes_read_the_same_data_set(movielens: Path, tmp_path: Path) -> None:
    dataset = load_dataset(str(movielens))
    path = write_dataset(dataset, tmp_path / "scratch")
    assert write_dataset(dataset, tmp_path / "scratch") == path
    again = read_dataset(path)
    assert again.fingerprint() == dataset.fingerprint()
    assert again.name == dataset.name


def test_users_that_gauc_is_over() -> None:
    dataset = load_dataset("world:num_users=12,num_items=30,num_events=600")
    found = user_aucs(
        Predictions(
            dataset.events.user_id[dataset.test],
            dataset.labels[dataset.test],
            np.zeros(int(dataset.test.sum()), np.float32),
            dataset.events.timestamp_ms[dataset.test],
        )
    )
    assert users_with_both_labels(dataset) == len(found.auc) > 0
    nothing = replace(dataset.events, labels=np.full_like(dataset.events.labels, np.nan))
    assert users_with_both_labels(replace(dataset, events=nothing)) == 0
