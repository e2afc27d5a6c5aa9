"""Rows that were computed too long ago count as not computed."""

from __future__ import annotations

import numpy as np
import pytest

from cache_actors.pool.staleness import UNBOUNDED, NewestStep, StalenessBound
from marm.memory import RAW_STEP, Namespace, UserRows

NAMESPACE = Namespace(dim=4)
NOW_S = 1_000_000.0


def make_rows(*, layers: int | None = None) -> UserRows:
    rows = np.zeros(4, NAMESPACE.layers_dtype(layers))
    rows["written_step"] = [RAW_STEP, 10, 90, 100]
    rows["written_s"] = [0, NOW_S - 500, NOW_S - 50, NOW_S]
    rows["memory"] = 1
    return UserRows(np.array([1, 2]), np.array([0, 2, 4]), rows)


@pytest.mark.parametrize(
    ("bound", "kept"),
    [
        (UNBOUNDED, [10, 90, 100]),
        (StalenessBound(max_steps=90), [10, 90, 100]),
        (StalenessBound(max_steps=89), [90, 100]),
        (StalenessBound(max_steps=0), [100]),
        (StalenessBound(max_age_s=500), [10, 90, 100]),
        (StalenessBound(max_age_s=49), [100]),
        (StalenessBound(max_steps=20, max_age_s=10), [100]),
    ],
)
def test_a_bound_keeps_what_is_fresh(bound: StalenessBound, kept: list[int]) -> None:
    found = make_rows()
    seen, num_stale = bound.apply(found, 100, NOW_S)
    steps = seen.rows["written_step"]
    assert steps[steps != RAW_STEP].tolist() == kept
    assert num_stale == 3 - len(kept)
    raw = seen.rows[1:][steps[1:] == RAW_STEP]
    assert not raw["memory"].any()
    assert not raw["written_s"].any()
    assert seen.offsets.tolist() == found.offsets.tolist()


@pytest.mark.parametrize("layers", [0, 1])
def test_a_bound_works_on_a_selection_of_layers_that_may_not_be_written(layers: int) -> None:
    found = make_rows(layers=layers)
    found.rows.flags.writeable = False
    seen, num_stale = StalenessBound(max_steps=0).apply(found, 100, NOW_S)
    assert num_stale == 2
    assert seen.rows["written_step"].tolist() == [RAW_STEP, RAW_STEP, RAW_STEP, 100]
    assert found.rows["written_step"].tolist() == [RAW_STEP, 10, 90, 100]


@pytest.mark.parametrize("wrong", [{"max_steps": -1}, {"max_age_s": -1}, {"max_age_s": np.nan}])
def test_impossible_bounds_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        StalenessBound(**wrong)


def test_the_newest_step_is_the_largest_that_was_seen() -> None:
    newest = NewestStep()
    assert newest.see(make_rows().rows[:0]) == RAW_STEP
    assert newest.see(make_rows().rows) == 100
    newest.see_step(7)
    assert newest.value == 100
