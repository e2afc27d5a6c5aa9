from __future__ import annotations

import asyncio

import numpy as np
import pytest
from serving_models import InProcessReader, some_items

from app.feedback import (
    FeedbackService,
    client_event_key,
    parse_report,
    rows_of_namespace,
    with_stored_times,
)
from app.schemas import FeedbackEvent
from cache_actors.event_log.log import EventLog
from cache_actors.group_commit import CommitQueue, GroupCommitter, RecentReports
from marm.addressing import event_key
from marm.events import TASKS, EventBatch, pack_feedback
from marm.items import ItemCatalog
from marm.memory import RAW_STEP, Namespace

NOW_MS = 1_700_000_000_000
CATALOG = ItemCatalog(some_items())


def event(user_id=1, item_id=3, labels=None, **more) -> FeedbackEvent:
    fields = {"user_id": user_id, "item_id": item_id, "labels": labels or {"click": 1}, **more}
    return FeedbackEvent.model_validate(fields)


class RealLog:
    """The committer that the log writer actor runs, in this process."""

    def __init__(self, path) -> None:
        self.log = EventLog(path)
        self.committer = GroupCommitter(self.log, RecentReports.of_log(self.log))

    async def append(self, events: EventBatch) -> list[bool]:
        # A queue lives on one event loop, and every call of `send` runs a loop of its own.
        return await CommitQueue(self.committer, interval_ms=1).append(events)


@pytest.fixture
def log(tmp_path):
    return RealLog(tmp_path / "log")


@pytest.fixture
def reader():
    return InProcessReader()


def rows_of(reader, user_id=1) -> np.ndarray:
    return reader.memory.fetch(np.array([user_id]), 100).rows


def send(log, stores, *events, now_ms=NOW_MS, timeout_s=5.0):
    async def live_stores():
        return {store.namespace: store for store in stores}

    service = FeedbackService(log, lambda: CATALOG, live_stores, timeout_s)
    return asyncio.run(service.accept(list(events), now_ms))


def test_client_keys_are_stable():
    assert client_event_key(42, "a1b2") == 0xC4C8165D16D81B32
    assert client_event_key(1, "2:3") != client_event_key(12, ":3")


def test_columns_of_a_report():
    report = parse_report(
        [
            event(item_id=3, labels={"click": 1, "like": 0, "watch_time": 2.5}, context_id=4),
            event(item_id=999, timestamp_ms=5, event_id="x"),
        ],
        CATALOG,
        NOW_MS,
    )
    events = report.events
    assert events.timestamp_ms.tolist() == [NOW_MS, 5]
    assert events.author_id.tolist() == [4, 0]
    assert events.duration_ms.tolist() == [3000, 0]
    assert events.context_id.tolist() == [4, 0]
    assert report.known_item.tolist() == [True, False]
    assert report.has_time.tolist() == [False, True]
    assert events.event_key[0] == event_key(1, 3, NOW_MS)[0]
    assert events.event_key[1] == client_event_key(1, "x")
    labels = dict(zip(TASKS, events.labels[0].tolist(), strict=True))
    assert (labels["click"], labels["like"], labels["watch_time"]) == (1.0, 0.0, 2.5)
    assert np.isnan(labels["follow"])


def test_raw_rows_follow_the_sequence_of_the_namespace():
    report = parse_report(
        [event(labels={"long_view": 1}), event(labels={"long_view": 0}), event(labels={"like": 1})],
        CATALOG,
        NOW_MS,
    )
    users, rows = rows_of_namespace(report.events, Namespace(depth=1, dim=8))
    assert (len(users), len(rows)) == (3, 3)
    assert rows["feedback"].tolist() == pack_feedback(report.events.labels).tolist()
    assert set(rows["written_step"].tolist()) == {RAW_STEP}
    users, rows = rows_of_namespace(report.events, Namespace(depth=1, dim=8, sequence="long_view"))
    assert len(users) == len(rows) == 1


def test_feedback_is_in_the_log_and_in_memory(log, reader):
    response = send(log, [reader], event(item_id=3), event(user_id=2, item_id=4))
    assert (response.accepted, response.duplicates, response.degraded) == (2, 0, [])
    assert log.log.num_events() == 2
    assert rows_of(reader)["item_id"].tolist() == [3]
    assert rows_of(reader, 2)["item_id"].tolist() == [4]


def test_repeats_change_nothing(log, reader):
    for expected in ("accepted", "duplicate", "duplicate"):
        response = send(log, [reader], event(timestamp_ms=7), event(item_id=5, event_id="x"))
        assert [receipt.status for receipt in response.events] == [expected] * 2
    assert log.log.num_events() == 2
    assert len(rows_of(reader)) == 2


def test_a_named_event_keeps_its_first_time(log, reader):
    first = send(log, [reader], event(event_id="x"))
    second = send(log, [reader], event(event_id="x", labels={"like": 1}), now_ms=NOW_MS + 60_000)
    assert second.accepted == 1
    assert second.events[0].timestamp_ms == first.events[0].timestamp_ms == NOW_MS
    (row,) = rows_of(reader)
    both = np.full((1, len(TASKS)), np.nan, np.float32)
    both[0, [TASKS.index("click"), TASKS.index("like")]] = 1
    assert row["feedback"] == pack_feedback(both)[0]


def test_times_are_matched_by_user_and_key(reader):
    rows = np.zeros(1, reader.namespace.row_dtype)
    rows["event_key"], rows["timestamp_ms"] = client_event_key(1, "x"), 77
    reader.save_for(2, rows)
    report = parse_report([event(event_id="x"), event(user_id=2, event_id="x")], CATALOG, NOW_MS)
    keys = report.events.event_key
    keys[1] = keys[0]  # as a collision would
    stored = reader.memory.fetch(np.array([1, 2]), 10)
    assert with_stored_times(report, stored).events.timestamp_ms.tolist() == [NOW_MS, 77]


def test_late_events_take_their_place(log, reader):
    send(log, [reader], event(item_id=3, timestamp_ms=1000))
    send(log, [reader], event(item_id=4, timestamp_ms=500))
    assert rows_of(reader)["item_id"].tolist() == [4, 3]


def test_every_live_namespace_gets_the_rows(log, reader):
    other = InProcessReader(Namespace(depth=2, dim=4))
    send(log, [reader, other], event())
    assert len(rows_of(reader)) == len(rows_of(other)) == 1


def test_without_any_model_the_log_still_takes_events(log):
    assert send(log, [], event()).accepted == 1


def test_a_dead_shard_delays_rows_and_a_repeat_brings_them(log, reader):
    reader.down = True
    response = send(log, [reader], event(timestamp_ms=9))
    assert response.accepted == 1
    assert "did not take the rows yet" in response.degraded[0]
    reader.down = False
    assert send(log, [reader], event(timestamp_ms=9)).duplicates == 1
    assert len(rows_of(reader)) == 1


def test_when_the_log_fails_no_row_is_stored(reader):
    class BrokenLog:
        async def append(self, events):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        send(BrokenLog(), [reader], event())
    assert len(rows_of(reader)) == 0
