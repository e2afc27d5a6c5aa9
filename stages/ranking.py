"""Ranking: the long history scores every candidate on every task in one pass."""

from __future__ import annotations

from dataclasses import dataclass

from stages.knobs import RankingKnobs
from stages.models import check_scores
from stages.request import StageRequest, StageResult
from stages.scoring import ScoringStage


@dataclass(frozen=True, kw_only=True)
class RankingStage(ScoringStage):
    """One loaded version of a ranking model. Serving reads its memory and never writes it."""

    tasks: tuple[str, ...]

    def run(self, request: StageRequest, knobs: RankingKnobs) -> StageResult:
        """The ``request.limit`` best candidates with their predictions per task.

        The best by the knobs' fusion of the tasks, under their rule for diversity; with such a
        rule, scores need not fall from place to place.

        Raises:
            TurnMissedError: its time was over before it could be computed.
        """
        scored = self.scorer.score(request, knobs)
        scores_MT = scored.scores
        expected = (len(request.candidates), len(self.tasks))
        check_scores(scores_MT, expected, f"ranking/{self.variant}")
        fused_M = knobs.fusion.bind(self.tasks).fuse(scores_MT)
        chosen = knobs.diversity.rule().select(request.candidates, fused_M, request.limit)
        notes = (*scored.notes, knobs.fusion.unlearned(self.tasks), chosen.note)
        kept = chosen.positions
        return StageResult(
            stage="ranking",
            variant=self.variant,
            model_version=self.version,
            namespace=self.namespace,
            candidates=request.candidates.take(kept),
            scores=fused_M[kept],
            tasks=self.tasks,
            task_scores=scores_MT[kept],
            rows=scored.history.read,
            num_in=len(request.candidates),
            reason="; ".join(note for note in notes if note),
        )
