from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache_actors.event_log.catalog import read_catalog
from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from marm.events import TASKS, EventBatch
from marm.metrics import gauc
from train.data.ingest_report import IngestError
from train.data.world import World, write_world
from train.data.world_config import WorldConfig

SMALL = WorldConfig(num_users=60, num_items=300, num_events=5_000, seed=7)
LONG_VIEW = TASKS.index("long_view")


def all_events(config: WorldConfig, chunk_size: int = 1_000) -> EventBatch:
    return EventBatch.concat(list(World(config).stream(chunk_size)))


def assert_same(left: EventBatch, right: EventBatch) -> None:
    for name in left.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def test_the_same_world_twice_however_it_is_cut() -> None:
    events = all_events(SMALL)
    assert len(events) == SMALL.num_events
    assert_same(events, all_events(SMALL, chunk_size=37))
    other = all_events(WorldConfig(num_users=60, num_items=300, num_events=5_000, seed=8))
    assert not np.array_equal(events.item_id, other.item_id)


def test_a_shorter_world_is_the_beginning_of_a_longer_one() -> None:
    longer = WorldConfig(num_users=60, num_items=300, num_events=9_000, seed=7)
    assert_same(all_events(SMALL), all_events(longer).take(slice(5_000)))


def test_events_are_in_order_and_a_user_never_ties() -> None:
    events = all_events(SMALL)
    assert np.all(np.diff(events.timestamp_ms) >= 0)
    assert events.timestamp_ms[0] >= SMALL.start_ms
    for user_id in np.unique(events.user_id):
        assert np.all(np.diff(events.timestamp_ms[events.user_id == user_id]) > 0)
    assert len(np.unique(events.event_key)) == len(events)


def test_labels_agree_with_each_other() -> None:
    events = all_events(SMALL)
    by_task = dict(zip(TASKS, events.labels.T, strict=True))
    assert not np.isnan(events.labels).any()
    threshold_s = np.minimum(events.duration_ms / 1_000, 18.0)
    watched_long = by_task["watch_time"] >= threshold_s * (1 - 1e-6)
    np.testing.assert_array_equal(watched_long, by_task["long_view"] > 0)
    for task in ("long_view", "like", "comment", "forward", "follow"):
        assert np.all(by_task["click"] >= by_task[task])
    assert np.all(by_task["watch_time"] > 0)


def test_items_describe_the_events() -> None:
    world = World(SMALL)
    items = world.items()
    assert items.item_id.tolist() == list(range(1, SMALL.num_items + 1))
    events = EventBatch.concat(list(world.stream()))
    at = events.item_id - 1
    np.testing.assert_array_equal(items.tag_id[at], events.tag_id)
    np.testing.assert_array_equal(items.author_id[at], events.author_id)
    np.testing.assert_array_equal(items.duration_ms[at], events.duration_ms)


def test_popularity_is_long_tailed() -> None:
    counts = np.sort(np.bincount(all_events(SMALL).item_id))[::-1]
    assert counts[:30].sum() > 0.25 * counts.sum()


def test_expectations_are_calibrated_for_every_task() -> None:
    world = World(WorldConfig(num_users=300, num_items=500, num_events=40_000))
    chunks = list(world.stream_revealed())
    labels = np.concatenate([events.labels for events, _ in chunks])
    expected = np.concatenate([expectation for _, expectation in chunks])
    error = np.sqrt(labels.var(axis=0) / len(labels))
    assert np.all(np.abs(labels.mean(axis=0) - expected.mean(axis=0)) < 5 * error)
    assert np.all(labels.mean(axis=0) > 0.002)


def habit_gauc(config: WorldConfig) -> dict[str, float]:
    """GAUC of the truth, of the user's taste for the tag, and of the user's taste for the tag after
    the tag last enjoyed; tastes are counts over the user's past."""
    chunks = list(World(config).stream_revealed())
    events = EventBatch.concat([batch for batch, _ in chunks])
    expected = np.concatenate([expectation for _, expectation in chunks])
    labels = events.labels[:, LONG_VIEW]
    past: dict[tuple[int, ...], list[float]] = {}
    enjoyed: dict[int, int] = {}
    scores = np.zeros((2, len(events)))
    columns = (events.user_id, events.tag_id, labels)
    for index, (user, tag, label) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True)
    ):
        shallow = past.setdefault((user, tag), [0.0, 0.0])
        deep = past.setdefault((user, enjoyed.get(user, 0), tag), [0.0, 0.0])
        scores[0, index] = (shallow[0] + 1.0) / (shallow[1] + 2.5)
        scores[1, index] = (deep[0] + 2.0 * scores[0, index]) / (deep[1] + 2.0)
        for counts in (shallow, deep):
            counts[0] += label
            counts[1] += 1
        if label > 0:
            enjoyed[user] = tag
    late = slice(int(0.7 * len(events)), None)
    users, late_labels = events.user_id[late], labels[late]
    return {
        "truth": gauc(users, late_labels, expected[late, LONG_VIEW]),
        "tag": gauc(users, late_labels, scores[0, late]),
        "tag_after_tag": gauc(users, late_labels, scores[1, late]),
    }


def test_what_was_liked_in_this_context_before_tells_more_than_what_was_liked() -> None:
    sized = {"num_users": 250, "num_items": 1_000, "num_events": 50_000}
    result = habit_gauc(WorldConfig(**sized))
    assert 0.78 < result["truth"] < 0.88
    assert result["tag_after_tag"] > result["tag"] + 0.03
    without = habit_gauc(WorldConfig(**sized, induction_strength=0.0))
    assert without["tag_after_tag"] < without["tag"] + 0.005


def test_the_world_answers_and_lives_on() -> None:
    world = World(SMALL)
    for _ in world.stream():
        pass
    users = np.arange(1, 61)
    items = np.full(60, 5)
    now_ms = world.now_ms + 1_000
    expected = world.reveal(users, items, 1, now_ms)
    answer = world.respond(users, items, 1, now_ms)
    np.testing.assert_array_equal(answer, world.respond(users, items, 1, now_ms))
    np.testing.assert_array_equal(expected, world.reveal(users, items, 1, now_ms))
    assert expected.shape == answer.shape == (60, len(TASKS))
    events = world.accept(users, items, 1, now_ms, answer)
    assert events.timestamp_ms.tolist() == [now_ms] * 60
    np.testing.assert_array_equal(events.labels, answer)
    after = world.reveal(users, items, 1, now_ms + 10_000)
    # The same item right after: every user is a bit more tired of it, or wants something else.
    assert np.all(after[:, LONG_VIEW] != expected[:, LONG_VIEW])


def test_answers_follow_the_expectations() -> None:
    world = World(SMALL)
    for _ in world.stream():
        pass
    users = np.repeat(np.arange(1, 61), 300)
    items = np.tile(np.arange(1, 301), 60)
    expected = world.reveal(users, items, 2, world.now_ms)
    answers = world.respond(users, items, 2, world.now_ms)
    error = np.sqrt(answers.var(axis=0) / len(answers))
    assert np.all(np.abs(answers.mean(axis=0) - expected.mean(axis=0)) < 5 * error + 1e-4)


def test_the_end_of_a_stream_is_exactly_its_last_event() -> None:
    """What a user who reads the log knows is what the world knows."""
    sized = {"num_users": 2_000, "num_items": 300, "seed": 3}
    world = World(WorldConfig(**sized, num_events=12_000))
    events = EventBatch.concat(list(world.stream()))
    assert world.now_ms == events.timestamp_ms[-1]
    longer = WorldConfig(**sized, num_events=15_000)
    chunks = list(World(longer).stream_revealed())
    following = EventBatch.concat([batch for batch, _ in chunks]).take(slice(12_000, None))
    expected = np.concatenate([expectation for _, expectation in chunks])[12_000:]
    users, first = np.unique(following.user_id, return_index=True)
    last_ms = dict(zip(events.user_id.tolist(), events.timestamp_ms, strict=True))
    # Sessions that go on; a new one may begin with other interests.
    going_on = [
        index
        for user, index in zip(users.tolist(), first.tolist(), strict=True)
        if following.timestamp_ms[index] - last_ms.get(user, 0) < 120_000
    ]
    assert going_on
    asked = world.reveal(
        following.user_id[going_on],
        following.item_id[going_on],
        following.context_id[going_on],
        following.timestamp_ms[going_on],
    )
    np.testing.assert_allclose(asked, expected[going_on], rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_users": 0}, "num_users must be"),
        ({"num_tags": 1}, "num_tags >= 2"),
        ({"num_interests": 24}, "num_interests < num_tags"),
        ({"num_items": 10}, "every tag needs an item"),
        ({"induction_strength": float("nan")}, "induction_strength must be"),
        ({"sessions_per_day": 0.0}, "sessions_per_day"),
        ({"drift_per_session": 2.0}, "drift_per_session"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_impossible_worlds_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WorldConfig(**wrong)


def test_questions_about_strangers_are_refused() -> None:
    world = World(SMALL)
    one = np.ones(1, np.int64)
    with pytest.raises(ValueError, match=r"user ids of this world are 1\.\.60"):
        world.reveal(one * 61, one, 1, 0)
    with pytest.raises(ValueError, match=r"item ids of this world are 1\.\.300"):
        world.respond(one, one * 0, 1, 0)
    with pytest.raises(ValueError, match="context ids"):
        world.respond(one, one, 9, 0)
    labels = world.respond(np.ones(2, np.int64), np.array([1, 2]), 1, 0)
    with pytest.raises(ValueError, match="one exposure per user"):
        world.accept(np.ones(2, np.int64), np.array([1, 2]), 1, 0, labels)


def test_a_world_is_written_once(tmp_path: Path) -> None:
    told: list[int] = []
    world = write_world(tmp_path, SMALL, lambda stage, amount: told.append(amount))
    log = EventLog(tmp_path / "log")
    assert told[-1] == log.num_events() == SMALL.num_events
    stored = EventBatch.concat(list(log.read(LogOffsets.start(), max_events=10_000)))
    expected = all_events(SMALL)
    order = np.lexsort((expected.event_key, expected.timestamp_ms))
    assert_same(stored, expected.take(order))
    assert len(read_catalog(tmp_path / "log")) == SMALL.num_items
    assert world.now_ms == expected.timestamp_ms[-1]
    with pytest.raises(IngestError, match="already in the log"):
        write_world(tmp_path, SMALL)
    assert log.num_events() == SMALL.num_events
