"""How far stored rows are from those that the final weights compute, by the age of the row.

A row's age is the number of events of the stream after it. "Fresh" has two meanings, and both are
measured on the same rows:

- ``one_step``: the final weights compute the row once more from its own inputs as the memory holds
  them, the stored vectors of the n rows before it. It is what one more write would change.
- ``rebuilt``: all rows that it depends on are computed again too, from the log (`train.rebuild`).
  It is the distance to a memory without any past.

Rows are compared in the dtype of the memory, so that rows of unchanged weights have no distance.

Shape legend: E events, L stored layers, D row width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from benchmarks.paper.datasets import Dataset
from benchmarks.paper.trial import Pass
from benchmarks.paper.watched_pass import ask
from cache_actors.store.lookup import ALL_ROWS
from cache_actors.store.row_formats import as_read
from marm.events import EventBatch
from marm.memory import Memory, UserRows
from marm.ranker import Ranker
from marm.sequence import raw_rows
from train.rebuild.compare import LayerErrors, RowErrors, compare_rows, summarize
from train.rebuild.histories import Histories, gather_histories
from train.rebuild.recompute import RowComputer
from train.rebuild.stored import NO_ROW, needed_for, stored_position

DEFINITIONS = ("one_step", "rebuilt")
_YOUNGEST, _FACTOR = 1_024, 4
_EVENTS_AT_ONCE = 256


@dataclass(frozen=True)
class AgeDrift:
    """Rows with at least ``at_least`` and less than ``below`` events of the stream after them."""

    at_least: int
    below: int
    rows: int
    layers: dict[str, tuple[LayerErrors, ...]]  # by definition of fresh


def age_edges(num_events: int) -> list[int]:
    """Where classes of age begin, and where the last one ends: 0, 1,024, then four times as old."""
    edges = [0]
    following = _YOUNGEST
    while following < num_events:
        edges.append(following)
        following *= _FACTOR
    return [*edges, num_events]


def measure_drift(
    done: Pass, dataset: Dataset, rows_per_age: int, seed: int = 0
) -> tuple[AgeDrift, ...]:
    """Compare up to ``rows_per_age`` random rows of every class of age; empty classes are left out.

    Args:
        done: a pass whose memory still holds all of its rows.
        dataset: what it streamed.
        rows_per_age: rows to compare in each class.
        seed: of the choice of rows.

    Raises:
        ValueError: when the memory has lost rows that are asked for.
    """
    config, model = done.trainer.config, done.trainer.learners[0].model
    assert isinstance(model, Ranker)
    users = np.unique(dataset.events.user_id)
    histories = gather_histories([dataset.events], users, config.namespace.sequence)
    stamps = dataset.events.timestamp_ms
    age = len(stamps) - np.searchsorted(stamps, histories.events.timestamp_ms, side="right")
    edges = age_edges(len(stamps))
    chosen = choose_rows(age, edges, rows_per_age, np.random.default_rng(seed))
    needed = needed_for(histories, chosen, config.models[0].receptive_field)
    part, chosen, age = histories.select(needed), chosen[needed], age[needed]
    stored = _stored_rows(done.memory, part, chosen)
    events = part.events.take(chosen)
    fresh = {
        "one_step": one_step_rows(model, done.memory, events),
        "rebuilt": rebuilt_rows(model, part)[chosen],
    }
    errors = {name: compare_rows(stored, rows) for name, rows in fresh.items()}
    return tuple(_by_age(errors, age[chosen], edges))


def choose_rows(
    age: NDArray[np.int64], edges: Sequence[int], most: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Up to ``most`` random places of every class of age, as a mask."""
    chosen = np.zeros(len(age), np.bool_)
    for at_least, below in pairwise(edges):
        places = np.flatnonzero((age >= at_least) & (age < below))
        chosen[rng.permutation(places)[:most]] = True
    return chosen


def one_step_rows(model: Ranker, memory: Memory, events: EventBatch) -> NDArray[np.void]:
    """Rows of ``events`` from the stored vectors of the n rows before each."""
    rows = raw_rows(events, memory.namespace.row_dtype)
    for index in distinct_users(events.user_id, _EVENTS_AT_ONCE):
        asked = events.take(index)
        before = memory.fetch(
            asked.user_id, model.config.history_length, before_ms=asked.timestamp_ms
        )
        rows["memory"][index] = ask(model, model.inputs.for_reading(asked, before)).rows_BLD
    rows["written_step"] = 0
    return as_read(memory.namespace, rows)


def rebuilt_rows(model: Ranker, histories: Histories) -> NDArray[np.void]:
    """Rows of all events of ``histories``, with everything before them computed again."""
    parts = [rows for _, rows in RowComputer(model, 0, 0).rows(histories)]
    namespace = model.config.namespace
    return as_read(namespace, np.concatenate([np.empty(0, namespace.row_dtype), *parts]))


def distinct_users(user_id: NDArray[np.int64], most: int) -> Iterator[NDArray[np.int64]]:
    """All places of ``user_id`` in groups of at most ``most``, no user twice in a group."""
    order = np.argsort(user_id, kind="stable")
    ordered = user_id[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)])
    turn = np.arange(len(ordered)) - np.repeat(starts, np.diff(np.append(starts, len(ordered))))
    for number in range(int(turn.max(initial=-1)) + 1):
        places = order[turn == number]
        for begin in range(0, len(places), most):
            yield places[begin : begin + most]


def _stored_rows(
    memory: Memory, histories: Histories, chosen: NDArray[np.bool_]
) -> NDArray[np.void]:
    ends = histories.events.timestamp_ms[histories.offsets[1:] - 1]
    stored: UserRows = memory.fetch(histories.user_ids, ALL_ROWS, ends + 1)
    position = stored_position(stored, histories)[chosen]
    lost = int((position == NO_ROW).sum())
    if lost:
        raise ValueError(
            f"the memory lacks {lost} of {len(position)} rows to compare; give it no limit of rows"
        )
    return stored.rows[position]


def _by_age(
    errors: dict[str, RowErrors], age: NDArray[np.int64], edges: Sequence[int]
) -> Iterator[AgeDrift]:
    for at_least, below in pairwise(edges):
        here = (age >= at_least) & (age < below)
        if here.any():
            layers = {name: summarize(found.take(here)) for name, found in errors.items()}
            yield AgeDrift(at_least, below, int(here.sum()), layers)
