"""What serving calls on a model, and the checks on what it answers.

Shapes: M candidates, T tasks, V vector width. Every call is for one user with all candidates.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from marm.items import ItemFeatures
from marm.memory import UserRows


class RetrievalModel(Protocol):
    """A retriever: an item's score is its best inner product with a user vector."""

    def user_vectors(
        self, rows: UserRows, user_id: int, now_ms: int, context_id: int
    ) -> NDArray[np.float32]:
        """The queries of one user, ``[num_user_vectors, V]``."""
        ...


class ScoringModel(Protocol):
    """A cascader, with one score per candidate, or a ranker, with one prediction per candidate and
    task."""

    def score(
        self, rows: UserRows, user_id: int, candidates: ItemFeatures, now_ms: int, context_id: int
    ) -> NDArray[np.float32]:
        """``[M]``, or probabilities, and seconds for watch time, ``[M, T]``."""
        ...


def check_scores(scores: NDArray[np.float32], shape: tuple[int, ...], name: str) -> None:
    """Refuse an answer that would silently scramble the order of the candidates."""
    if scores.shape != shape or not np.isfinite(scores).all():
        raise ValueError(
            f"{name} must answer finite scores of shape {list(shape)}, got shape "
            f"{list(scores.shape)} with {int((~np.isfinite(scores)).sum())} not finite; "
            "pin an earlier version"
        )
