"""`marm memory` as an operator runs it, on a home with a trained model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from marm_command import run_marm

from app.cli.memory.pools import pool_directory
from cache_actors.event_log.erase import user_events
from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.exposure_log.schema import Exposure, exposures_to_table
from cache_actors.exposure_log.segments import write_segment
from cache_actors.home import Home
from cache_actors.transfer.restore_mark import restore_awaited

pytestmark = pytest.mark.cluster

NUM_EVENTS, USER = 400, 3


@pytest.fixture
def home(tmp_path: Path, marm: Callable[..., dict[str, Any]]) -> Home:
    """A home with a log and a memory of every event in it."""
    path = tmp_path / "home"
    world = ["--users", "12", "--items", "40", "--events", str(NUM_EVENTS)]
    done = run_marm("world", *world, "--home", str(path))
    assert done.returncode == 0, done.stderr
    settings = "--depth 1 --dim 8 --history 5 --shards 2 --stages ranking --batch-size 64"
    trained = marm("train", "--home", str(path), *settings.split())
    assert trained["events_seen"] == NUM_EVENTS
    return Home(path)


def held(status: dict[str, Any], count: str) -> int:
    shards = status["shards"]
    return sum(names[count] for shard in shards for names in shard["namespaces"].values())


@pytest.mark.timeout(900)
def test_a_memory_is_governed(
    home: Home, tmp_path: Path, marm: Callable[..., dict[str, Any]]
) -> None:
    at_home = ("--home", str(home.path))
    status = marm("memory", "status", *at_home)
    assert [shard["answers"] for shard in status["shards"]] == [True, True]
    assert held(status, "rows") == NUM_EVENTS
    users = held(status, "users")
    assert sum(shard["buckets"] for shard in status["shards"]) == 256

    taken = marm("memory", "snapshot", str(tmp_path / "warm"), *at_home)
    assert taken["rows"] == NUM_EVENTS

    shutil.copytree(tmp_path / "warm", tmp_path / "old")
    new = ("--home", str(tmp_path / "new"))
    brought = marm("memory", "restore", str(tmp_path / "warm"), *new, "--shards", "3")
    assert (brought["rows"], brought["users"]) == (NUM_EVENTS, users)
    assert restore_awaited(pool_directory(Home(tmp_path / "new"), "default"), required=True) is None

    moved = marm("memory", "rebalance", "--shards", "4", *new)
    assert (moved["num_shards_before"], moved["num_shards"]) == (3, 4)
    assert moved["rows_moved"] > 0
    assert moved["probe"]["users"] == users
    assert moved["probe"]["lowest_hit_rate"] == 1
    status = marm("memory", "status", *new)
    assert (held(status, "rows"), held(status, "users")) == (NUM_EVENTS, users)
    assert status["restore"]["rows"] == NUM_EVENTS

    small = marm("memory", "convert", "--dtype", "int8", *new)
    assert small["rows_written"] == small["rows"] == NUM_EVENTS
    again = ("--namespace", small["source"], *new)
    assert marm("memory", "convert", "--dtype", "int8", *again)["rows_written"] == 0

    mine = len(user_events(EventLog(home.log), USER))
    assert mine > 0
    exported = marm("memory", "export", str(USER), "-o", str(tmp_path / "user.jsonl"), *at_home)
    lines = [json.loads(line) for line in (tmp_path / "user.jsonl").read_text().splitlines()]
    assert exported["events"] == mine == sum(line["kind"] == "event" for line in lines)
    assert [line["kind"] for line in lines].count("row") == mine
    assert {line["user_id"] for line in lines} == {USER}

    shown = Exposure("r1", 5, USER, np.array([1]), np.array([0.5], np.float32))
    write_segment(home.exposures, exposures_to_table([shown]))
    where = ("--snapshot", str(tmp_path / "warm"), *at_home)
    done = marm("memory", "forget", str(USER), "--yes", *where)
    assert (done["events_erased"], done["exposures_removed"]) == (mine, 1)
    assert done["rows_removed_from_snapshots"] == {str(tmp_path / "warm"): mine}
    batches = EventLog(home.log).read(LogOffsets.start())
    assert USER not in np.concatenate([batch.user_id for batch in batches])
    for part in (tmp_path / "warm").rglob("*.parquet"):
        assert USER not in pq.read_table(part).column("user_id").to_pylist()

    # An older copy of the snapshot does not bring the user back.
    marm("memory", "restore", str(tmp_path / "old"), *at_home)
    after = marm("memory", "status", *at_home)
    assert held(after, "rows") == NUM_EVENTS - mine
    assert held(after, "forgotten_rows") >= mine


def refused(*args: str) -> str:
    done = run_marm("memory", *args)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_bad_input_is_refused_before_anything_starts(tmp_path: Path) -> None:
    at_home = ("--home", str(tmp_path / "home"))
    assert "there is no memory of a pool 'default' at" in refused("status", *at_home)
    assert "there is no memory at" in refused("forget", "1", "--yes", *at_home)
    assert "there is no snapshot at" in refused("restore", str(tmp_path / "none"), *at_home)
    assert "give either the URL of a snapshot, or --abandon" in refused("restore", *at_home)
    assert "Protocol not known" in refused("restore", "odd://place", *at_home)
    assert "there is no snapshot at" in refused(
        "forget", "1", "--yes", "--snapshot", str(tmp_path / "none"), *at_home
    )
    assert list(tmp_path.iterdir()) == []
