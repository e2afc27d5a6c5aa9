"""What ranking and cascading share: read rows, choose the depth that can be afforded, score.

Degrading goes by layer: L cached layers, fewer, raw rows only, no rows. The score at a lower depth
is that of the same model with the upper layers masked, as for a row that was never memorised.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from marm.memory import Namespace
from stages.depth import DepthPlanner, ScoringWork
from stages.history import History, MemoryReader, read_history
from stages.knobs import ScoringKnobs
from stages.models import ScoringModel
from stages.request import StageRequest
from stages.turns import Turns


@dataclass(frozen=True)
class Scored:
    """Scores of all candidates of a request, and what they were computed from."""

    scores: NDArray[np.float32]  # [M] or [M, T]
    history: History

    @property
    def notes(self) -> tuple[str, ...]:
        """What the scores had to do without."""
        return (self.history.note,) if self.history.note else ()


@dataclass(frozen=True)
class CandidateScorer:
    """One loaded model with the memory it reads and what is known of its cost."""

    model: ScoringModel
    memory: MemoryReader
    history_length: int
    depth: int
    planner: DepthPlanner
    turns: Turns

    def score(self, request: StageRequest, knobs: ScoringKnobs) -> Scored:
        """Score all candidates of ``request`` in one pass over one copy of the user's rows.

        Raises:
            TurnMissedError: the request waited for others beyond its deadline.
        """
        history = self._read(request, knobs)
        with self.turns.turn(request.deadline_ms):
            history = self._affordable(history, request)
            began_s = time.perf_counter()
            scores = self.model.score(
                history.rows,
                request.user_id,
                request.candidates,
                history.now_ms,
                request.context_id,
            )
            elapsed_ms = (time.perf_counter() - began_s) * 1000
        self.planner.observe(len(history), len(request.candidates), history.depth, elapsed_ms)
        return Scored(scores, history)

    def _read(self, request: StageRequest, knobs: ScoringKnobs) -> History:
        """The newest rows, with the layers that they have and that may be used."""
        length = at_most(self.history_length, knobs.max_history_length)
        wanted = at_most(self.depth, knobs.max_depth)
        history = read_history(self.memory, request, length, wanted, knobs.memory_read_ms)
        # Vectors that no row has cost time and change nothing.
        return history.at_depth(history.read.depth)

    def _affordable(self, history: History, request: StageRequest) -> History:
        """The same with as many layers as there is time for now."""
        left_ms = request.deadline_ms - time.time() * 1000
        plan = self.planner.plan(history.depth, len(history), len(request.candidates), left_ms)
        if not plan.with_rows:
            note = f"scored without rows, with {left_ms:.0f} ms left"
            return replace(history.without_rows(), note=note)
        if plan.depth < history.depth:
            note = f"depth {plan.depth} instead of {history.depth}, with {left_ms:.0f} ms left"
            return replace(history.at_depth(plan.depth), note=note)
        return history


def at_most(value: int, limit: int | None) -> int:
    """``value``, or ``limit`` where it is lower."""
    return value if limit is None else min(value, limit)


@dataclass(frozen=True, kw_only=True)
class ScoringStage:
    """What a loaded version of a ranking or cascading model is made of."""

    variant: str
    version: int
    model: ScoringModel
    memory: MemoryReader
    history_length: int
    depth: int
    error_layers: int = 0  # of the depth, see `ModelConfig`
    turns: Turns = field(default_factory=Turns, repr=False, compare=False)
    scorer: CandidateScorer = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        work = ScoringWork(self.namespace.dim, self.depth, self.error_layers)
        planner = DepthPlanner(work)  # knows nothing of the model's cost yet
        scorer = CandidateScorer(
            self.model, self.memory, self.history_length, self.depth, planner, self.turns
        )
        object.__setattr__(self, "scorer", scorer)

    @property
    def namespace(self) -> Namespace:
        """The memory that is read."""
        return self.memory.namespace
