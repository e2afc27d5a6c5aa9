"""How many cached layers a request can afford, from the time it has left and what scoring cost
recently.

Shapes: n rows, M candidates, D row width, L layers. Layers above the chosen depth are masked, which
is what a model sees of rows without vectors; they are never left out, since the heads were trained
on the output of the last one.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from marm.memory import UserRows

MIN_OBSERVED = 8
"""Scorings before the cost is believed: the first ones also pay for warming up."""

MARGIN = 1.25
"""A depth is affordable when this many times its expected cost fits."""

ANSWER_MS = 2.0
"""Kept for choosing the best candidates and sending them."""

_FORGET = 0.95  # weight of a scoring falls to this with the next: about the last 20 count


@dataclass(frozen=True)
class ScoringWork:
    """Floating-point operations of scoring; what differs by rows, candidates and depth.

    Per layer of attention that is used: key and value projection of the rows, logits and mixing.
    Per layer of attention, used or masked: query, output and feed-forward of the candidates. The
    first ``error_layers`` cached layers are no attention: one row of them is read, which is
    nothing beside it.
    """

    dim: int  # D
    depth: int  # L
    error_layers: int = 0

    def gflop(self, num_rows: int, num_candidates: int, depth: int) -> float:
        """Work of one request at ``depth``; num_rows 0 leaves only what a candidate costs."""
        rows = 8.0 * self.dim**2 * num_rows
        attention = 4.0 * self.dim * num_rows * num_candidates
        candidates = 12.0 * self.dim**2 * num_candidates
        used, all_layers = (max(0, of - self.error_layers) + 1 for of in (depth, self.depth))
        return (used * (rows + attention) + all_layers * candidates) * 1e-9


class CostMeter:
    """Recent milliseconds as a line over the work, ``fixed + per_gflop * work``, fitted by least
    squares with weights that halve about every 14 scorings. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moments = np.zeros(5)  # weighted sums of 1, x, y, x*x, x*y
        self._observed = 0

    def observe(self, gflop: float, elapsed_ms: float) -> None:
        """Note what one scoring took."""
        sample = np.array([1.0, gflop, elapsed_ms, gflop * gflop, gflop * elapsed_ms])
        with self._lock:
            self._moments = self._moments * _FORGET + sample
            self._observed += 1

    def expected_ms(self, gflop: float) -> float | None:
        """Milliseconds that so much work should take; None while too little was seen."""
        with self._lock:
            if self._observed < MIN_OBSERVED:
                return None
            count, sum_x, sum_y, sum_xx, sum_xy = self._moments.tolist()
        mean_x, mean_y = sum_x / count, sum_y / count
        spread = sum_xx / count - mean_x**2
        if spread <= 1e-4 * mean_x**2:
            # All alike: no line can be told, so the time is taken to be all work, none of it fixed.
            return mean_y * gflop / mean_x if mean_x > 0 else mean_y
        slope = max(0.0, (sum_xy / count - mean_x * mean_y) / spread)
        return max(0.0, mean_y - slope * mean_x) + slope * gflop


@dataclass(frozen=True)
class DepthPlan:
    """What can be afforded: so many layers, and whether rows at all."""

    depth: int
    with_rows: bool


@dataclass(frozen=True)
class DepthPlanner:
    """Chooses the depth of each request of one loaded model."""

    work: ScoringWork
    meter: CostMeter = field(default_factory=CostMeter)

    def plan(self, wanted: int, num_rows: int, num_candidates: int, left_ms: float) -> DepthPlan:
        """The largest depth up to ``wanted`` that fits into ``left_ms``; raw rows when only layer 0
        fits, no rows when that does not fit either."""
        budget_ms = (left_ms - ANSWER_MS) / MARGIN
        for depth in range(wanted, -1, -1):
            expected_ms = self.meter.expected_ms(self.work.gflop(num_rows, num_candidates, depth))
            if expected_ms is None or expected_ms <= budget_ms:
                return DepthPlan(depth, True)
        return DepthPlan(0, num_rows == 0)

    def observe(self, num_rows: int, num_candidates: int, depth: int, elapsed_ms: float) -> None:
        """Note what one scoring took."""
        self.meter.observe(self.work.gflop(num_rows, num_candidates, depth), elapsed_ms)


def first_layers(rows: UserRows, depth: int) -> UserRows:
    """The same rows with the vectors of their first ``depth`` layers only; nothing is copied.

    Raises:
        ValueError: when the rows have fewer layers.
    """
    dtype = rows.rows.dtype
    stored = dtype["memory"].shape[0]
    if depth == stored:
        return rows
    if not 0 <= depth < stored:
        raise ValueError(f"rows have {stored} layers, got a depth of {depth}; ask for fewer")
    names = list(dtype.names or ())
    formats = [dtype[name] for name in names]
    at = names.index("memory")
    formats[at] = np.dtype((dtype["memory"].base, (depth, *dtype["memory"].shape[1:])))
    offsets = [dtype.fields[name][1] for name in names] if dtype.fields else []
    narrow = np.dtype(
        {"names": names, "formats": formats, "offsets": offsets, "itemsize": dtype.itemsize}
    )
    return UserRows(rows.user_ids, rows.offsets, rows.rows.view(narrow))
