"""Baselines of retrieval, agreement of cascading and labels, each against a plain form."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from sample_events import make_events, make_items, replaced

from marm.events import TASKS
from marm.memory import InProcessMemory, Namespace
from marm.sequence import raw_rows
from train import item_to_item, popularity, seen_catalog
from train.agreement import WINDOW_EVENTS, agreement, windows
from train.batch_history import BatchHistory
from train.item_to_item import ItemToItem
from train.popularity import Popularity
from train.predictions import Predictions
from train.screening import LABELS, EventScreen
from train.seen_catalog import SeenCatalog


def test_the_catalog_knows_items_by_their_first_place_and_last_attributes() -> None:
    catalog, items = SeenCatalog(), make_items(1500)
    first = catalog.add(items)
    again = catalog.add(
        type(items)(items.item_id[::-1], items.author_id, items.tag_id, items.duration_ms)
    )
    np.testing.assert_array_equal(first, np.arange(1500))
    np.testing.assert_array_equal(again, np.arange(1500)[::-1])
    np.testing.assert_array_equal(catalog.items().author_id, items.author_id[::-1])
    assert catalog.places(np.array([-1])).tolist() == [-1]
    other = SeenCatalog()
    other.load(catalog.state())
    assert len(other) == 1500
    np.testing.assert_array_equal(other.state(), catalog.state())


def test_a_full_catalog_takes_no_more_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen_catalog, "MAX_ITEMS", 3)
    catalog = SeenCatalog()
    assert catalog.add(make_items(5)).tolist() == [0, 1, 2, -1, -1]
    assert len(catalog) == 3


def test_popularity_halves_with_every_half_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(popularity, "HALF_LIFE_POSITIVES", 10)
    monkeypatch.setattr(popularity, "_RESCALE", 4.0)
    popular = Popularity()
    popular.add(np.array([0, 0]))
    for _ in range(6):
        popular.add(np.full(5, 1))
    scores = popular.scores(3)
    expected = sum(5 * 2.0 ** (-5 * k / 10) for k in range(6)) / (2 * 2.0 ** (-(2 + 25) / 10))
    assert scores[1] / scores[0] == pytest.approx(expected)
    assert scores[2] == 0
    assert 0 < scores.sum() < 1
    other = Popularity()
    other.load(popular.state())
    np.testing.assert_array_equal(other.scores(3), scores)
    assert not Popularity().scores(2).any()


@pytest.mark.parametrize("pending", [1, 7, 1 << 16])
def test_item_to_item_counts_what_came_after(monkeypatch: pytest.MonkeyPatch, pending: int) -> None:
    monkeypatch.setattr(item_to_item, "PENDING_PAIRS", pending)
    rng = np.random.default_rng(0)
    counted, plain = ItemToItem(), Counter[tuple[int, int]]()
    for _ in range(20):
        before, after = rng.integers(0, 8, (2, 5))
        counted.add(before, after)
        plain.update(zip(before.tolist(), after.tolist(), strict=True))
    expected = [sum(plain[seed, item] for seed in (2, 5)) for item in range(7)]
    assert counted.scores(np.array([5, 2, 5]), 7).tolist() == expected
    assert not counted.scores(np.empty(0, np.int64), 7).any()
    other = ItemToItem()
    other.load(counted.state())
    assert other.scores(np.array([2, 5]), 7).tolist() == expected


def test_item_to_item_forgets_the_rarest_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_to_item, "PENDING_PAIRS", 1)
    monkeypatch.setattr(item_to_item, "MAX_PAIRS", 4)
    counted = ItemToItem()
    for after in (1, 1, 1, 2, 2, 3, 4, 5):
        counted.add(np.array([0]), np.array([after]))
    assert len(counted) <= 4
    assert counted.scores(np.array([0]), 6)[[1, 2]].tolist() == [3, 2]


@pytest.mark.parametrize("sequence", ["all", "like"])
@pytest.mark.parametrize("stored", ["before the batch", "also the batch"])
def test_the_past_of_an_event_is_what_came_before_it(sequence: str, stored: str) -> None:
    events, like = make_events(60), TASKS.index("like")
    in_batch = np.arange(60) >= 35
    enters = np.ones(60, np.bool_) if sequence == "all" else events.labels[:, like] > 0
    kept = enters if stored == "also the batch" else enters & ~in_batch
    namespace = Namespace(depth=0, dim=4, sequence=sequence)
    memory = InProcessMemory(namespace)
    memory.save(events.user_id[kept], raw_rows(events.take(kept), namespace.row_dtype))
    batch = events.take(in_batch)
    history = BatchHistory(batch, memory.fetch(np.unique(batch.user_id), 100), sequence, "like", 8)
    follows, item_before = history.consecutive_positives()
    before = dict(zip(follows.tolist(), item_before.tolist(), strict=True))
    for index in range(len(batch)):
        earlier = (events.user_id == batch.user_id[index]) & enters
        earlier &= events.timestamp_ms < batch.timestamp_ms[index]
        past = history.past(index)
        np.testing.assert_array_equal(past.items, events.item_id[earlier][-8:])
        np.testing.assert_array_equal(past.positive, (events.labels[earlier, like] > 0)[-8:])
        liked = events.item_id[earlier & (events.labels[:, like] > 0)]
        if batch.labels[index, like] > 0 and len(liked):
            assert before.pop(index) == liked[-1]
    assert not before


def test_windows_are_consecutive_events_of_a_user() -> None:
    rng = np.random.default_rng(0)
    users = rng.integers(0, 4, 130)
    place_GW = windows(users)
    seen = {user: [] for user in range(4)}
    for window in place_GW:
        filled = window[window >= 0]
        assert len(np.unique(users[filled])) == 1
        seen[int(users[filled[0]])] += filled.tolist()
    for user, places in seen.items():
        assert places == np.flatnonzero(users == user).tolist()
    assert windows(np.empty(0, np.int64)).shape == (0, WINDOW_EVENTS)


def test_agreement_of_cascading_with_ranking() -> None:
    events = replaced(make_events(200), user_id=np.arange(200) % 2)
    scores = np.random.default_rng(0).random((200, 2)).astype(np.float32)
    ranking = Predictions.of(("click", "like"), events, scores)
    same = agreement(ranking, Predictions.of(("like",), events, scores[:, 1:]), "like")
    assert (same["pairs_alike"], same["kendall_tau"], same["top_5_recall"]) == (1.0, 1.0, 1.0)
    assert same["windows"] == 10
    opposite = agreement(ranking, Predictions.of(("like",), events, -scores[:, 1:]), "like")
    assert (opposite["pairs_alike"], opposite["kendall_tau"]) == (0.0, -1.0)
    assert opposite["top_5_recall"] == 0.0
    guess = Predictions.of(("like",), events, np.zeros((200, 1), np.float32))
    assert agreement(ranking, guess, "like")["pairs_alike"] == 0.5
    assert math.isnan(agreement(ranking, guess, "like")["kendall_tau"])
    assert agreement(Predictions(("click",)), Predictions(("like",)), "like") == {}
    with pytest.raises(ValueError, match="same events"):
        agreement(
            ranking, Predictions.of(("like",), events.take(slice(1, None)), scores[1:, 1:]), "like"
        )


def test_impossible_labels_are_unknown_and_counted() -> None:
    events = make_events(20)
    screen = EventScreen(max_ahead_s=None)
    good = screen.pass_on(events)
    assert screen.tallies[LABELS] == 0
    assert good is events
    labels = events.labels.copy()
    labels[0, 0], labels[1, 1], labels[2, -1], labels[3, 2] = np.inf, 1.5, -1.0, -np.inf
    labels[4, -1], labels[5, 3] = 1e6, 0.5
    found = screen.pass_on(replaced(events, labels=labels))
    assert screen.tallies[LABELS] == 4
    expected = labels.copy()
    expected[0, 0] = expected[1, 1] = expected[2, -1] = expected[3, 2] = np.nan
    np.testing.assert_array_equal(found.labels, expected)
