"""One task of a rebuild: some users' rows, from the log into the memory. Knows nothing of Ray."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marm.events import EventBatch
from marm.memory import Ack, Memory
from train.rebuild.histories import Histories, gather_histories
from train.rebuild.recompute import RowComputer
from train.rebuild.stored import (
    DueRule,
    LayeredMemory,
    fetch_stored,
    needed_for,
    stored_position,
    stored_steps,
)
from train.rebuild.weights import RankingWeights

GROUP_EVENTS = 16_384
"""Events of the users whose rows are looked up together."""

SAVE_ROWS = 4_096
_MAX_PENDING_SAVES = 4


@dataclass(frozen=True)
class TaskReport:
    """What became of the users of one task."""

    users: int = 0  # that have events
    rows: int = 0  # that these users should have
    users_due: int = 0
    rows_computed: int = 0  # due ones and the history that they need
    rows_written: int = 0

    def __add__(self, other: TaskReport) -> TaskReport:
        return TaskReport(
            self.users + other.users,
            self.rows + other.rows,
            self.users_due + other.users_due,
            self.rows_computed + other.rows_computed,
            self.rows_written + other.rows_written,
        )


class Rebuilder:
    """Writes the due rows of users with one frozen version.

    Args:
        weights: the version.
        memory: of the version's namespace.
        rule: which rows are due.
        newest: rows per user to look after, counted from the newest; None: all.
    """

    def __init__(
        self,
        weights: RankingWeights,
        memory: LayeredMemory,
        rule: DueRule,
        newest: int | None = None,
    ) -> None:
        check_namespace(weights, memory)
        self._config, self._step, self._model = weights.config, weights.step, weights.build()
        self._memory, self._rule, self._newest = memory, rule, newest
        self._reach = weights.config.receptive_field

    def rebuild(self, batches: Iterable[EventBatch], user_ids: NDArray[np.int64]) -> TaskReport:
        """Rebuild ``user_ids``, in this order, from ``batches``, which hold all their events.

        Every written row is acknowledged when this returns.
        """
        keep = None if self._newest is None else self._newest + self._reach
        histories = gather_histories(batches, user_ids, self._config.namespace.sequence, keep)
        saves = _Saves(self._memory)
        report = TaskReport()
        for group in groups_of(histories, GROUP_EVENTS):
            report += self._rebuild_group(group, saves)
        saves.flush()
        return report

    def _rebuild_group(self, group: Histories, saves: _Saves) -> TaskReport:
        stored = fetch_stored(self._memory, group, layers=0)
        wanted = np.ones(len(group.events), np.bool_)
        if self._newest is not None:
            wanted = group.from_newest < self._newest
        due = wanted & self._rule.due(stored_steps(stored, stored_position(stored, group)))
        report = TaskReport(users=len(group.user_ids), rows=int(wanted.sum()))
        if not due.any():
            return report
        needed = needed_for(group, due, self._reach)
        part, due = group.select(needed), due[needed]
        computer = RowComputer(self._model, self._step, int(time.time()))
        for block, rows in computer.rows(part):
            is_due = due[block.start : block.end]
            owners = part.events.user_id[block.start : block.end]
            saves.add(owners[is_due], rows[is_due])
        return report + TaskReport(
            users_due=len(part.user_ids),
            rows_computed=len(part.events),
            rows_written=int(due.sum()),
        )


def check_namespace(weights: RankingWeights, memory: Memory) -> None:
    """Refuse a memory of another namespace than the version computes rows for."""
    if memory.namespace != weights.config.namespace:
        raise ValueError(
            f"the version computes rows of {weights.config.namespace.name}, but the memory is "
            f"{memory.namespace.name}; open the version's namespace"
        )


def groups_of(histories: Histories, group_events: int) -> Iterator[Histories]:
    """Runs of users with about ``group_events`` events together; one user is never split."""
    start = 0
    for end in range(1, len(histories.user_ids) + 1):
        is_full = histories.offsets[end] - histories.offsets[start] >= group_events
        if is_full or end == len(histories.user_ids):
            yield histories.of_users(start, end)
            start = end


class _Saves:
    """Gathers rows into batches worth a call and keeps few of them under way."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._owners: list[NDArray[np.int64]] = []
        self._rows: list[NDArray[np.void]] = []
        self._under_way: deque[Ack] = deque()

    def add(self, owners: NDArray[np.int64], rows: NDArray[np.void]) -> None:
        if not len(rows):
            return
        self._owners.append(owners)
        self._rows.append(rows)
        if sum(map(len, self._rows)) >= SAVE_ROWS:
            self._send()

    def flush(self) -> None:
        """Return once every row is acknowledged; raise what any save failed with."""
        self._send()
        while self._under_way:
            self._under_way.popleft().wait()

    def _send(self) -> None:
        if not self._rows:
            return
        while len(self._under_way) >= _MAX_PENDING_SAVES:
            self._under_way.popleft().wait()
        owners, rows = np.concatenate(self._owners), np.concatenate(self._rows)
        self._under_way.append(self._memory.save(owners, rows))
        self._owners, self._rows = [], []
