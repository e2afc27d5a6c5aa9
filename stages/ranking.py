"""Ranking: the long history scores every candidate on every task in one pass."""

from __future__ import annotations

from dataclasses import dataclass

from marm.memory import Namespace
from stages.fusion import best_first, fuse_task_scores
from stages.history import MemoryReader, read_history
from stages.knobs import RankingKnobs
from stages.models import RankingModel, check_scores
from stages.request import StageRequest, StageResult


@dataclass(frozen=True)
class RankingStage:
    """One loaded version of a ranking model. Serving reads its memory and never writes it."""

    variant: str
    version: int
    model: RankingModel
    memory: MemoryReader
    history_length: int
    depth: int
    tasks: tuple[str, ...]

    @property
    def namespace(self) -> Namespace:
        """The memory that is read."""
        return self.memory.namespace

    def run(self, request: StageRequest, knobs: RankingKnobs) -> StageResult:
        """The ``request.limit`` best candidates with their predictions per task."""
        history = read_history(self.memory, request, self.history_length, self.depth)
        scores_MT = self.model.score(
            history.rows, request.user_id, request.candidates, history.now_ms, request.context_id
        )
        expected = (len(request.candidates), len(self.tasks))
        check_scores(scores_MT, expected, f"ranking/{self.variant}")
        fused_M = fuse_task_scores(self.tasks, scores_MT, knobs.fusion)
        kept = best_first(fused_M, request.limit)
        return StageResult(
            stage="ranking",
            variant=self.variant,
            model_version=self.version,
            namespace=self.namespace,
            candidates=request.candidates.take(kept),
            scores=fused_M[kept],
            tasks=self.tasks,
            task_scores=scores_MT[kept],
            rows=history.read,
            num_in=len(request.candidates),
        )
