"""What was acknowledged, kept where no fault of the memory can reach it, and compared with reads.

A mapped file, so that readers in other processes know what they must see: whatever was acknowledged
before a read began.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.perf.faults.rows import is_wrong
from benchmarks.perf.stored_rows import user_ids
from marm.memory import Namespace, UserRows

_NEVER = -1


@dataclass(frozen=True)
class Comparison:
    """A read against what had been acknowledged before it began."""

    expected_rows: int
    found_rows: int
    wrong_rows: int

    @property
    def missing_rows(self) -> int:
        """Acknowledged rows that were not there, or only as an older step had computed them."""
        return self.expected_rows - self.found_rows


class Ledger:
    """The newest acknowledged step of every row. Each user has one writer."""

    def __init__(self, path: Path, num_users: int, rows_per_user: int, mode: str = "r+") -> None:
        self.path = path
        self.users = np.sort(user_ids(num_users))
        self.rows_per_user = rows_per_user
        shape = (num_users, rows_per_user)
        self._steps: NDArray[np.int32] = np.memmap(path, np.int32, mode, shape=shape)  # type: ignore[call-overload]

    @staticmethod
    def create(path: Path, num_users: int, rows_per_user: int) -> Ledger:
        """An empty ledger."""
        ledger = Ledger(path, num_users, rows_per_user, "w+")
        ledger._steps[:] = _NEVER
        return ledger

    @property
    def num_rows(self) -> int:
        """Acknowledged rows."""
        return int(np.count_nonzero(self._steps != _NEVER))

    def acknowledge(
        self, users: NDArray[np.int64], numbers: NDArray[np.int64], steps: NDArray[np.int64]
    ) -> None:
        """Rows that the memory has promised to keep; ``users`` are positions in ``self.users``."""
        self._steps[users, numbers] = steps

    def promised(self, users: NDArray[np.int64]) -> NDArray[np.int32]:
        """Steps acknowledged by now, ``[U, rows_per_user]``; -1 where there is nothing."""
        return self._steps[users].copy()

    def compare(
        self,
        namespace: Namespace,
        users: NDArray[np.int64],
        promised: NDArray[np.int32],
        found: UserRows,
        n: int,
    ) -> Comparison:
        """A read of every user's newest ``n`` rows, against what was promised before it.

        More rows may have been saved since, so the promised rows may be further back.
        """
        owners = np.repeat(np.arange(len(users)), found.counts)
        wrong = is_wrong(namespace, self.users[users][owners], found.rows)
        numbers = found.rows["item_id"]
        steps_found = np.full_like(promised, _NEVER)
        sound = ~wrong & (numbers < self.rows_per_user) & (numbers >= 0)
        steps_found[owners[sound], numbers[sound]] = found.rows["written_step"][sound]
        expected = promised != _NEVER
        if n < self.rows_per_user:
            newest = np.zeros(len(users), np.int64)
            np.maximum.at(newest, owners[sound], numbers[sound])
            promised_last = expected.sum(axis=1) - 1
            last = np.maximum(newest, promised_last)
            expected &= np.arange(self.rows_per_user) > (last - n)[:, None]
        kept = expected & (steps_found >= promised)
        return Comparison(int(expected.sum()), int(kept.sum()), int(wrong.sum()))
