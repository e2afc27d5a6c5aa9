"""Histories that changed after their rows were computed, and what may become of those rows.

A row of layer l depends on the l * n events before it, so one changed event reaches L * n rows. The
treatments of rows that depend on a change:

- ``stale``: vectors stay; items are the new ones.
- ``own_raw``: only the rows of the changed events themselves become raw.
- ``raw``: every row that depends on a change becomes raw, which layers above 0 mask.
- ``recomputed``: those rows are computed again from the changed history (`train.rebuild`), by the
  weights of the moment.

Shape legend: E events of the histories, oldest first within a user.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.lookup import ALL_ROWS
from cache_actors.store.row_formats import as_read
from marm.items import ItemFeatures
from marm.memory import RAW_STEP, Memory
from marm.memory_arrays import ArrayMemory
from marm.ranker import Ranker
from train.rebuild.histories import Histories
from train.rebuild.recompute import RowComputer
from train.rebuild.stored import NO_ROW, needed_for, stored_position

CHANGES = ("replace", "remove")
TREATMENTS = ("stale", "own_raw", "raw", "recomputed")


@dataclass(frozen=True)
class StoredHistories:
    """Histories with the row of every event."""

    histories: Histories
    rows: NDArray[np.void]  # [E]

    def select(self, keep: NDArray[np.bool_]) -> StoredHistories:
        """Only the events of a mask ``[E]``, and only users that have any."""
        return StoredHistories(self.histories.select(keep), self.rows[keep])


@dataclass(frozen=True)
class Changed:
    """Histories after a change, their rows still as they were stored."""

    stored: StoredHistories
    depends: tuple[NDArray[np.bool_], ...]
    """By l = 0..L, ``[E]``: what depends on a change through the l * n events before it; at 0 the
    changed events themselves."""
    num_changed: int


@dataclass(frozen=True)
class Overhead:
    """What became of the rows that a query can see, and what that took."""

    visible_rows: int
    hit_rate: float  # of these, the share with vectors
    valid_share: float  # and the share with vectors that depend on no change
    events_computed: int
    cpu_s: float


def stored_histories(memory: Memory, histories: Histories) -> StoredHistories:
    """The rows that ``memory`` holds of all events.

    Raises:
        ValueError: when it lacks some.
    """
    ends = histories.events.timestamp_ms[histories.offsets[1:] - 1]
    stored = memory.fetch(histories.user_ids, ALL_ROWS, ends + 1)
    position = stored_position(stored, histories)
    lost = int((position == NO_ROW).sum())
    if lost:
        raise ValueError(
            f"the memory lacks {lost} of {len(position)} rows; give it no limit of rows"
        )
    return StoredHistories(histories, stored.rows[position])


def change_histories(
    stored: StoredHistories,
    change: str,
    fraction: float,
    items: ItemFeatures,
    reach: tuple[int, ...],
    rng: np.random.Generator,
) -> Changed:
    """Change each event with probability ``fraction``.

    Args:
        stored: histories as they are.
        change: ``replace`` puts another random item of ``items`` in its place, with the feedback as
            it was; ``remove`` takes the event out.
        fraction: between 0 and 1.
        items: at least two.
        reach: how many events before it the rows of each layer depend on, from 0 on.
        rng: chooses events and items.
    """
    if change not in CHANGES:
        raise ValueError(f"a change is one of {', '.join(CHANGES)}, got {change!r}")
    hit = rng.random(len(stored.rows)) < fraction
    depends = tuple(depends_on(stored.histories, hit, events) for events in reach)
    if change == "remove":
        kept = tuple(one[~hit] for one in depends)
        return Changed(stored.select(~hit), kept, int(hit.sum()))
    replaced = _with_other_items(stored, hit, items, rng)
    return Changed(replaced, depends, int(hit.sum()))


def depends_on(histories: Histories, changed: NDArray[np.bool_], reach: int) -> NDArray[np.bool_]:
    """Which events are changed, or have a changed one of their user among the ``reach`` before."""
    before = np.concatenate([[0], np.cumsum(changed)])
    index = np.arange(len(changed))
    first = np.maximum(histories.offsets[:-1][histories.user_row], index - reach)
    result: NDArray[np.bool_] = before[index + 1] > before[first]
    return result


def treat(
    changed: Changed, treatment: str, model: Ranker, step: int, everything: bool = False
) -> tuple[ArrayMemory, Overhead]:
    """A memory of the rows that a query can see, treated, and what that took.

    Args:
        changed: the histories.
        treatment: one of `TREATMENTS`.
        model: computes rows again, as of ``step``.
        step: what rows that are computed again say.
        everything: treat all rows, not only those that depend on a change.
    """
    if treatment not in TREATMENTS:
        raise ValueError(f"a treatment is one of {', '.join(TREATMENTS)}, got {treatment!r}")
    histories, n = changed.stored.histories, model.config.history_length
    visible = histories.from_newest < n
    rows = changed.stored.rows.copy()
    dirty = np.ones(len(rows), np.bool_) if everything else changed.depends[-1]
    computed, cpu_began = 0, time.process_time()
    valid = ~dirty
    if treatment in ("own_raw", "raw"):
        lost = changed.depends[0] if treatment == "own_raw" else dirty
        rows["written_step"][lost] = RAW_STEP
        rows["memory"][lost] = 0
    elif treatment == "recomputed":
        computed = _recompute(histories, rows, dirty & visible, model, step)
        valid = np.ones(len(rows), np.bool_)
    cpu_s = time.process_time() - cpu_began
    memory = ArrayMemory(model.config.namespace, n)
    memory.save(histories.events.user_id[visible], rows[visible])
    has_vectors = rows["written_step"][visible] != RAW_STEP
    overhead = Overhead(
        int(visible.sum()),
        _share(has_vectors),
        _share(has_vectors & valid[visible]),
        computed,
        cpu_s,
    )
    return memory, overhead


def _recompute(
    histories: Histories, rows: NDArray[np.void], due: NDArray[np.bool_], model: Ranker, step: int
) -> int:
    """Write the ``due`` of ``rows`` anew; returns how many events that took."""
    if not due.any():
        return 0
    needed = needed_for(histories, due, model.config.receptive_field)
    part = histories.select(needed)
    fresh = np.concatenate([found for _, found in RowComputer(model, step, 0).rows(part)])
    fresh = as_read(model.config.namespace, fresh)
    wanted = due[needed]
    for name in ("memory", "written_step"):
        rows[name][due] = fresh[name][wanted]
    return len(fresh)


def _with_other_items(
    stored: StoredHistories, hit: NDArray[np.bool_], items: ItemFeatures, rng: np.random.Generator
) -> StoredHistories:
    events, rows = stored.histories.events, stored.rows.copy()
    place = rng.integers(0, len(items), int(hit.sum()))
    same = items.item_id[place] == events.item_id[hit]
    place[same] = (place[same] + 1) % len(items)
    columns = {}
    for name in ("item_id", "author_id", "tag_id", "duration_ms"):
        columns[name] = getattr(events, name).copy()
        columns[name][hit] = getattr(items, name)[place]
        if name in (rows.dtype.names or ()):
            rows[name][hit] = columns[name][hit]
    histories = replace(stored.histories, events=replace(events, **columns))
    return StoredHistories(histories, rows)


def _share(flags: NDArray[np.bool_]) -> float:
    return float(flags.mean()) if len(flags) else 1.0
