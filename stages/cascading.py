"""Cascading: a short history scores every candidate in one pass; reads memory, never writes."""

from __future__ import annotations

from dataclasses import dataclass

from marm.memory import Namespace
from stages.fusion import best_first
from stages.history import MemoryReader, read_history
from stages.knobs import CascadingKnobs
from stages.models import CascadingModel, check_scores
from stages.request import StageRequest, StageResult


@dataclass(frozen=True)
class CascadingStage:
    """One loaded version of a cascading model."""

    variant: str
    version: int
    model: CascadingModel
    memory: MemoryReader
    history_length: int
    depth: int

    @property
    def namespace(self) -> Namespace:
        """The memory that is read."""
        return self.memory.namespace

    def run(self, request: StageRequest, knobs: CascadingKnobs) -> StageResult:
        """Keep the ``request.limit`` most promising candidates."""
        history = read_history(self.memory, request, self.history_length, self.depth)
        scores_M = self.model.score(
            history.rows, request.user_id, request.candidates, history.now_ms, request.context_id
        )
        check_scores(scores_M, (len(request.candidates),), f"cascading/{self.variant}")
        kept = best_first(scores_M, request.limit)
        return StageResult(
            stage="cascading",
            variant=self.variant,
            model_version=self.version,
            namespace=self.namespace,
            candidates=request.candidates.take(kept),
            scores=scores_M[kept],
            rows=history.read,
            num_in=len(request.candidates),
        )
