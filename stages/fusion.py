"""From predictions per task to one score per candidate. Shapes: M candidates, T tasks.

`stages.fusion_rules` has the settings that these are made from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Fusion(Protocol):
    """A formula over the tasks of one model."""

    def fuse(self, task_scores_MT: NDArray[np.float32]) -> NDArray[np.float32]:
        """One finite score per candidate, ``[M]``; the highest is the best."""
        ...


@dataclass(frozen=True)
class WeightedSum:
    """``sum_t weight_t * p_t``."""

    weight_T: NDArray[np.float32]

    def fuse(self, task_scores_MT: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `Fusion.fuse`."""
        return (task_scores_MT @ self.weight_T).astype(np.float32)


@dataclass(frozen=True)
class PowerProduct:
    """``prod_t (alpha_t + p_t) ^ beta_t``.

    An item must be good at every task: unlike in a sum, one excellent prediction doesn't make up
    for a poor one. ``beta_t`` is how much a task counts, ``alpha_t`` how little a prediction near
    zero hurts. A task with ``beta_t`` 0 does not count.
    """

    alpha_T: NDArray[np.float64]
    beta_T: NDArray[np.float64]

    def fuse(self, task_scores_MT: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `Fusion.fuse`."""
        # Predictions are never negative; what rounding left below zero must not meet a logarithm.
        factors_MT = np.log(self.alpha_T + np.maximum(task_scores_MT, 0.0, dtype=np.float64))
        return np.exp(factors_MT @ self.beta_T).astype(np.float32)


@dataclass(frozen=True)
class RankFusion:
    """``sum_t weight_t / (smoothing + rank_t)``, with ``rank_t`` 1 for the best candidate of task t
    and the same for equal ones (reciprocal rank fusion, Cormack et al., SIGIR 2009).

    It looks at the order alone, so tasks of any scale and calibration can be joined. A score has a
    meaning only among the candidates of its request.
    """

    weight_T: NDArray[np.float64]
    smoothing: float

    def fuse(self, task_scores_MT: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `Fusion.fuse`."""
        fused_M = np.zeros(len(task_scores_MT), np.float64)
        for column in np.flatnonzero(self.weight_T):
            falling_M = -task_scores_MT[:, column]
            rank_M = 1 + np.searchsorted(np.sort(falling_M), falling_M, side="left")
            fused_M += self.weight_T[column] / (self.smoothing + rank_M)
        return fused_M.astype(np.float32)


def best_first(scores_M: NDArray[np.float32], limit: int) -> NDArray[np.int64]:
    """Positions of the ``limit`` highest scores, best first; ties keep their order."""
    return np.argsort(-scores_M, kind="stable")[: max(limit, 0)]
