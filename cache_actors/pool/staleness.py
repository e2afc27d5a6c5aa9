"""Staleness: rows that were computed too long ago count as not computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marm.memory import RAW_STEP, UserRows


@dataclass(frozen=True)
class StalenessBound:
    """How old a memorised row may be for a reader: in training steps behind the newest step that
    is known, in seconds since it was computed, or both. None is no bound."""

    max_steps: int | None = None
    max_age_s: float | None = None

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.max_steps < 0:
            raise ValueError(f"max_steps must be at least 0, or None, got {self.max_steps}")
        if self.max_age_s is not None and not 0 <= self.max_age_s < math.inf:
            raise ValueError(
                f"max_age_s must be a number of seconds >= 0, or None, got {self.max_age_s}"
            )

    @property
    def is_unbounded(self) -> bool:
        """Whether every row is fresh enough."""
        return self.max_steps is None and self.max_age_s is None

    def stale(self, rows: NDArray[np.void], newest_step: int, now_s: float) -> NDArray[np.bool_]:
        """Which memorised rows are older than the bound; ``newest_step`` is the newest known."""
        stale = np.zeros(len(rows), np.bool_)
        if self.max_steps is not None:
            stale |= rows["written_step"] < newest_step - self.max_steps
        if self.max_age_s is not None:
            stale |= rows["written_s"] < now_s - self.max_age_s
        return stale & (rows["written_step"] != RAW_STEP)

    def apply(self, found: UserRows, newest_step: int, now_s: float) -> tuple[UserRows, int]:
        """``found`` with stale rows turned into raw ones, and how many those were."""
        if self.is_unbounded:
            return found, 0
        stale = self.stale(found.rows, newest_step, now_s)
        if not stale.any():
            return found, 0
        rows = found.rows if found.rows.flags.writeable else found.rows.copy()
        rows["written_step"][stale] = RAW_STEP
        rows["written_s"][stale] = 0
        if "memory" in (rows.dtype.names or ()):
            rows["memory"][stale] = 0
        return UserRows(found.user_ids, found.offsets, rows), int(stale.sum())


UNBOUNDED = StalenessBound()


class NewestStep:
    """The newest training step that is known to have written a row."""

    def __init__(self) -> None:
        self.value = RAW_STEP

    def see(self, rows: NDArray[np.void]) -> int:
        """Take the steps of ``rows`` into account. A lost race between threads costs nothing: the
        next look repeats it."""
        if len(rows):
            self.see_step(int(rows["written_step"].max()))
        return self.value

    def see_step(self, step: int) -> None:
        """Take one step into account."""
        if step > self.value:
            self.value = step
