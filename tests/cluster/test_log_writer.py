from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.home import Home
from cache_actors.log_writer import connect_log_writer, log_writer_name, stop_log_writer
from marm.events import TASKS, EventBatch

pytestmark = pytest.mark.cluster


@pytest.fixture
def home(ray_cluster: None, tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path / "home")
    yield home
    stop_log_writer(home)


def clicks(keys: list[int]) -> EventBatch:
    numbers = np.array(keys, np.int64)
    zeros = np.zeros(len(keys), np.int64)
    return EventBatch(
        user_id=numbers % 11,
        item_id=numbers,
        timestamp_ms=numbers,
        event_key=numbers.astype(np.uint64),
        author_id=zeros,
        tag_id=zeros,
        duration_ms=zeros,
        context_id=zeros.astype(np.int32),
        labels=np.ones((len(keys), len(TASKS)), np.float32),
    )


def keys_in(home: Home) -> list[int]:
    return [int(k) for b in EventLog(home.log).read(LogOffsets.start()) for k in b.event_key]


def test_appends_are_acknowledged_once_and_durable(home: Home) -> None:
    writer = connect_log_writer(home)
    assert writer.append(clicks([1, 2, 3])) == [True, True, True]
    assert keys_in(home) == [1, 2, 3]
    assert writer.append(clicks([3, 4])) == [False, True]
    update = clicks([4])
    assert writer.append(replace(update, labels=update.labels * 0)) == [True]
    assert asyncio.run(_append_async(home, clicks([4, 5]))) == [False, True]
    assert writer.append(EventBatch.empty()) == []
    info = writer.describe()
    assert (info.stats.appended, info.stats.duplicates) == (6, 2)
    assert info.last_segment == 4
    assert info.problems == []


async def _append_async(home: Home, events: EventBatch) -> list[bool]:
    return await connect_log_writer(home).append_async(events)


def test_concurrent_duplicates_are_appended_once(home: Home) -> None:
    with ThreadPoolExecutor(8) as pool:
        writers = list(pool.map(lambda _: connect_log_writer(home), range(8)))
        outcomes = list(pool.map(lambda w: w.append(clicks(list(range(30)))), writers))
    assert len({writer.describe().pid for writer in writers}) == 1
    assert np.sum(outcomes, axis=0).tolist() == [1] * 30
    assert sorted(keys_in(home)) == list(range(30))


def test_a_malformed_batch_is_refused_by_name_and_harms_nobody(home: Home) -> None:
    writer = connect_log_writer(home)
    with pytest.raises(ValueError, match="'item_id' must have shape"):
        writer.append(replace(clicks([1, 2]), item_id=np.zeros(1, np.int64)))
    assert writer.append(clicks([1])) == [True]


def test_a_kill_loses_no_acknowledged_event_and_repeats_none(home: Home) -> None:
    writer = connect_log_writer(home, interval_ms=5)
    acknowledged: list[int] = []
    first_acks = threading.Event()

    def post(first: int) -> None:
        own = connect_log_writer(home)
        for key in range(first, first + 60, 3):
            batch = [key, key + 1, key + 2]
            outcome = own.append(clicks(batch), timeout_s=60)
            assert len(outcome) == 3
            acknowledged.extend(batch)
            if len(acknowledged) > 15:
                first_acks.set()

    with ThreadPoolExecutor(3) as pool:
        posts = [pool.submit(post, first) for first in (0, 1_000, 2_000)]
        assert first_acks.wait(timeout=60)
        killed = writer.describe().pid
        os.kill(killed, signal.SIGKILL)
        for posted in posts:
            posted.result(timeout=120)
    assert len(acknowledged) == 180
    assert sorted(keys_in(home)) == sorted(acknowledged)
    assert connect_log_writer(home).append(clicks([0, 9_999])) == [False, True]
    assert connect_log_writer(home).describe().pid != killed


def test_a_stopped_writer_is_started_again_by_an_append(home: Home) -> None:
    writer = connect_log_writer(home)
    assert writer.append(clicks([1])) == [True]
    assert stop_log_writer(home)
    assert not stop_log_writer(home)
    assert writer.append(clicks([1, 2])) == [False, True]
    assert stop_log_writer(home)
    assert asyncio.run(writer.append_async(clicks([2, 3]), timeout_s=60)) == [False, True]
    assert keys_in(home) == [1, 2, 3]


def test_homes_have_their_own_writers(home: Home, tmp_path: Path) -> None:
    other = Home(tmp_path / "other")
    assert log_writer_name(home) != log_writer_name(other)
    try:
        assert connect_log_writer(home).append(clicks([1])) == [True]
        assert connect_log_writer(other).append(clicks([1])) == [True]
    finally:
        stop_log_writer(other)
