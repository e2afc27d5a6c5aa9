"""Cascading: a short history scores every candidate in one pass; reads memory, never writes."""

from __future__ import annotations

from dataclasses import dataclass

from stages.fusion import best_first
from stages.knobs import CascadingKnobs
from stages.models import check_scores
from stages.request import StageRequest, StageResult
from stages.scoring import ScoringStage


@dataclass(frozen=True, kw_only=True)
class CascadingStage(ScoringStage):
    """One loaded version of a cascading model: thousands of candidates in, hundreds out."""

    def run(self, request: StageRequest, knobs: CascadingKnobs) -> StageResult:
        """Keep the ``request.limit`` most promising candidates.

        Raises:
            TurnMissedError: its time was over before it could be computed.
        """
        scored = self.scorer.score(request, knobs)
        scores_M = scored.scores
        check_scores(scores_M, (len(request.candidates),), f"cascading/{self.variant}")
        kept = best_first(scores_M, request.limit)
        return StageResult(
            stage="cascading",
            variant=self.variant,
            model_version=self.version,
            namespace=self.namespace,
            candidates=request.candidates.take(kept),
            scores=scores_M[kept],
            rows=scored.history.read,
            num_in=len(request.candidates),
            reason="; ".join(scored.notes),
        )
