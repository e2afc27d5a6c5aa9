"""From predictions per task to one score per candidate. Shapes: M candidates, T tasks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray


def fuse_task_scores(
    tasks: tuple[str, ...], task_scores_MT: NDArray[np.float32], weights: Mapping[str, float]
) -> NDArray[np.float32]:
    """The weighted sum over the tasks that both the model and ``weights`` know, ``[M]``.

    A model that learned none of the weighted tasks is fused with equal weights, so that a model
    of one unusual task can be served without other configuration.
    """
    weight_T = np.array([weights.get(task, 0.0) for task in tasks], np.float32)
    if not weight_T.any():
        weight_T = np.ones(len(tasks), np.float32)
    return (task_scores_MT @ weight_T).astype(np.float32)


def best_first(scores_M: NDArray[np.float32], limit: int) -> NDArray[np.int64]:
    """Positions of the ``limit`` highest scores, best first; ties keep their order."""
    return np.argsort(-scores_M, kind="stable")[: max(limit, 0)]
