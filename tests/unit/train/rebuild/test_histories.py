"""Histories: one user's events in time order, as the rows that a memory makes of them."""

from __future__ import annotations

import numpy as np
import pytest
from rebuild_samples import namespace
from sample_events import make_events, replaced

from marm.events import TASKS, EventBatch, pack_feedback
from marm.memory import InProcessMemory
from marm.sequence import enters_sequence, raw_rows
from train.rebuild.histories import gather_histories


@pytest.mark.parametrize("sequence", ["all", "click"])
def test_histories_are_what_a_memory_makes_of_late_and_repeated_events(sequence: str) -> None:
    rng = np.random.default_rng(1)
    first = make_events(200, 6)
    again = first.take(rng.choice(200, 40, replace=False))  # second reports, other feedback
    labels = (rng.random((40, len(TASKS))) < 0.5).astype(np.float32)
    labels[rng.random(labels.shape) < 0.3] = np.nan
    events = EventBatch.concat([first, replaced(again, labels=labels)])
    shuffled = events.take(rng.permutation(len(events)))
    users = np.array([4, 0, 99, 3, 1])  # one unknown, two left out

    memory = InProcessMemory(namespace(sequence=sequence))
    keep = enters_sequence(shuffled, sequence)
    rows = raw_rows(shuffled, memory.namespace.row_dtype)
    # A memory is told of every report of an event that entered, later on too.
    positive = set(shuffled.event_key[keep].tolist())
    keep = np.array([key in positive for key in shuffled.event_key.tolist()])
    memory.save(shuffled.user_id[keep], rows[keep])

    cuts = np.array_split(np.arange(len(shuffled)), 5)
    histories = gather_histories((shuffled.take(cut) for cut in cuts), users, sequence)
    assert histories.user_ids.tolist() == [4, 0, 3, 1]
    stored = memory.fetch(histories.user_ids, 1_000)
    assert histories.offsets.tolist() == stored.offsets.tolist()
    for name in ("event_key", "timestamp_ms", "item_id"):
        np.testing.assert_array_equal(getattr(histories.events, name), stored.rows[name])
    np.testing.assert_array_equal(pack_feedback(histories.events.labels), stored.rows["feedback"])


def test_only_the_newest_events_of_each_user_are_kept() -> None:
    events = make_events(300, 4)
    users = np.unique(events.user_id)
    everything = gather_histories([events], users, "all")
    newest = gather_histories([events], users, "all", newest=5)
    assert newest.counts.tolist() == [5] * len(users)
    for index in range(len(users)):
        end = int(everything.offsets[index + 1])
        own = slice(int(newest.offsets[index]), int(newest.offsets[index + 1]))
        np.testing.assert_array_equal(
            newest.events.event_key[own], everything.events.event_key[end - 5 : end]
        )


def test_users_and_events_can_be_left_out() -> None:
    histories = gather_histories([make_events(50, 5)], np.arange(5), "all")
    part = histories.of_users(1, 3)
    assert part.user_ids.tolist() == [1, 2]
    assert np.unique(part.events.user_id).tolist() == [1, 2]
    assert part.offsets[0] == 0
    only_third = histories.select(histories.user_row == 3)
    assert only_third.user_ids.tolist() == [3]
    assert only_third.offsets.tolist() == [0, histories.counts[3]]
    assert only_third.from_newest.tolist() == list(range(histories.counts[3]))[::-1]


def test_no_events_are_no_histories() -> None:
    histories = gather_histories([], np.array([1, 2]), "all", newest=3)
    assert len(histories.user_ids) == len(histories.events) == 0
