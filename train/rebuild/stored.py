"""What a memory holds of some histories: which rows are there, and which are due to be rebuilt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cache_actors.store.lookup import ALL_ROWS
from marm.memory import RAW_STEP, Memory, UserRows
from train.rebuild.histories import Histories

ABSENT_STEP = RAW_STEP - 1
"""Stands for the ``written_step`` of a row that the memory does not hold."""

NO_ROW = -1


class LayeredMemory(Memory, Protocol):
    """A memory that can leave out layers: seeing which rows are there takes few of their bytes."""

    def fetch(
        self,
        user_ids: NDArray[np.int64],
        n: int,
        before_ms: NDArray[np.int64] | None = None,
        *,
        layers: int | None = None,
    ) -> UserRows:
        """`marm.memory.Memory.fetch` of rows with their first ``layers`` layers (None: all)."""
        ...


@dataclass(frozen=True)
class DueRule:
    """Which rows a rebuild with version ``step`` writes.

    Absent rows, raw rows, and rows that were computed before ``oldest_step`` are due. Rows newer
    than the version are fresher than anything it could compute and stay, unless ``replace_newer``.
    A row that was rebuilt carries ``step``, so it is not due again: that is what makes a rebuild
    that was cut short continue where it stopped.
    """

    step: int
    oldest_step: int
    replace_newer: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.oldest_step <= self.step:
            raise ValueError(
                f"oldest_step must be in [0, {self.step}], the version's step, "
                f"got {self.oldest_step}"
            )

    def due(self, written_step: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which rows of these steps (`RAW_STEP`, `ABSENT_STEP` included) to write."""
        due = written_step < self.oldest_step
        return due | (written_step > self.step) if self.replace_newer else due


def fetch_stored(
    memory: LayeredMemory, histories: Histories, layers: int | None = None
) -> UserRows:
    """Every row that ``memory`` holds of these users up to the ends of their histories, with the
    first ``layers`` layers (None: all)."""
    ends = histories.events.timestamp_ms[histories.offsets[1:] - 1]
    return memory.fetch(histories.user_ids, ALL_ROWS, ends + 1, layers=layers)


def stored_position(stored: UserRows, histories: Histories) -> NDArray[np.int64]:
    """For each event, the position of its row in ``stored.rows``; `NO_ROW` where there is none.

    ``stored`` is of the same users in the same order.
    """
    rows, events = stored.rows, histories.events
    num_rows = len(rows)
    owner = np.concatenate(
        [np.repeat(np.arange(len(stored.user_ids)), stored.counts), histories.user_row]
    )
    stamp = np.concatenate([rows["timestamp_ms"], events.timestamp_ms])
    key = np.concatenate([rows["event_key"], events.event_key])
    order = np.lexsort((key, stamp, owner))  # stable: the row comes right before its event
    same = (
        (owner[order][1:] == owner[order][:-1])
        & (stamp[order][1:] == stamp[order][:-1])
        & (key[order][1:] == key[order][:-1])
    )
    position = np.full(len(events), NO_ROW, np.int64)
    position[order[1:][same] - num_rows] = order[:-1][same]
    return position


def stored_steps(stored: UserRows, position: NDArray[np.int64]) -> NDArray[np.int32]:
    """``written_step`` of the rows at ``position``; `ABSENT_STEP` where there is none."""
    steps = np.append(stored.rows["written_step"], np.int32(ABSENT_STEP))
    return steps[position]  # NO_ROW is the appended one


def needed_for(histories: Histories, due: NDArray[np.bool_], reach: int) -> NDArray[np.bool_]:
    """Events to compute so that the ``due`` ones come out exact: from ``reach`` events before a
    user's first due one to his last. A row of layer l depends on at most l * n events before it.
    """
    index = np.arange(len(due))
    user = histories.user_row
    num_users = len(histories.user_ids)
    first = np.full(num_users, len(due), np.int64)
    last = np.full(num_users, -1, np.int64)
    np.minimum.at(first, user[due], index[due])
    np.maximum.at(last, user[due], index[due])
    return (index >= first[user] - reach) & (index <= last[user])
