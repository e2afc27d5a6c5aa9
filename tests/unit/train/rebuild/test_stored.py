"""Which rows are there, which are due, and what has to be computed for them."""

from __future__ import annotations

import numpy as np
import pytest
from rebuild_samples import STEP, SmallPool, frozen_weights, namespace, sample_history
from sample_events import make_events, make_rows

from marm.memory import RAW_STEP
from train.rebuild.histories import gather_histories
from train.rebuild.recompute import RowComputer
from train.rebuild.stored import (
    ABSENT_STEP,
    NO_ROW,
    DueRule,
    fetch_stored,
    needed_for,
    stored_position,
    stored_steps,
)

STEPS = np.array([ABSENT_STEP, RAW_STEP, 0, 50, 99, 100, 101], np.int32)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (DueRule(100, 100), [1, 1, 1, 1, 1, 0, 0]),  # older than the version
        (DueRule(100, 50), [1, 1, 1, 0, 0, 0, 0]),  # older than 50 steps
        (DueRule(100, 0), [1, 1, 0, 0, 0, 0, 0]),  # absent or raw
        (DueRule(100, 100, replace_newer=True), [1, 1, 1, 1, 1, 0, 1]),
    ],
)
def test_due_rows(rule: DueRule, expected: list[int]) -> None:
    assert rule.due(STEPS).astype(int).tolist() == expected


@pytest.mark.parametrize("oldest_step", [-1, 101])
def test_an_impossible_bound_is_refused(oldest_step: int) -> None:
    with pytest.raises(ValueError, match=r"oldest_step must be in \[0, 100\]"):
        DueRule(100, oldest_step)


def test_stored_rows_are_found_by_user_time_and_key() -> None:
    events = make_events(80, 4)
    events.timestamp_ms[:] = events.timestamp_ms[np.arange(80) // 2 * 2]  # simultaneous pairs
    histories = gather_histories([events], np.array([2, 0, 3]), "all")
    memory = SmallPool(namespace())
    kept = np.random.default_rng(0).random(len(histories.events)) < 0.5
    own = histories.events.take(kept)
    rows = make_rows(memory.namespace, own.timestamp_ms.tolist(), 7, keys=own.event_key.tolist())
    memory.save(own.user_id, rows)
    # A row that the log knows nothing of, and one from after the end of the histories.
    strange = make_rows(memory.namespace, [5, 1 << 50], 9)
    memory.save(np.array([0, 0]), strange)

    stored = fetch_stored(memory, histories)
    assert 1 << 50 not in stored.rows["timestamp_ms"].tolist()
    position = stored_position(stored, histories)
    np.testing.assert_array_equal(position != NO_ROW, kept)
    found = stored.rows[position[kept]]
    np.testing.assert_array_equal(found["event_key"], own.event_key)
    np.testing.assert_array_equal(found["timestamp_ms"], own.timestamp_ms)
    np.testing.assert_array_equal(stored_steps(stored, position), np.where(kept, 7, ABSENT_STEP))


def test_an_empty_memory_holds_nothing() -> None:
    histories = gather_histories([make_events(20, 3)], np.arange(3), "all")
    stored = fetch_stored(SmallPool(namespace()), histories)
    position = stored_position(stored, histories)
    assert (position == NO_ROW).all()
    assert (stored_steps(stored, position) == ABSENT_STEP).all()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_is_needed_is_enough_for_exact_rows(depth: int) -> None:
    n = 4
    weights = frozen_weights(namespace=namespace(depth=depth), history_length=n)
    events = sample_history(300, 3)
    histories = gather_histories([events], np.unique(events.user_id), "all")
    computer = RowComputer(weights.build(), STEP, 0)
    whole = np.concatenate([rows for _, rows in computer.rows(histories)])
    due = np.random.default_rng(depth).random(300) < 0.02
    needed = needed_for(histories, due, depth * n)
    assert (needed | ~due).all()
    assert needed.sum() < 300
    part = np.concatenate([rows for _, rows in computer.rows(histories.select(needed))])
    np.testing.assert_allclose(
        part["memory"][due[needed]], whole["memory"][due], rtol=1e-5, atol=1e-5
    )
