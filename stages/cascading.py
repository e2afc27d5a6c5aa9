"""Cascading: a short history scores every candidate in one pass; reads memory, never writes."""

from __future__ import annotations

from dataclasses import dataclass, field

from marm.memory import Namespace
from stages.fusion import best_first
from stages.history import MemoryReader
from stages.knobs import CascadingKnobs
from stages.models import ScoringModel, check_scores
from stages.request import StageRequest, StageResult
from stages.scoring import CandidateScorer
from stages.turns import Turns


@dataclass(frozen=True)
class CascadingStage:
    """One loaded version of a cascading model: thousands of candidates in, hundreds out."""

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
        scorer = CandidateScorer.of(
            self.model,
            self.memory,
            self.history_length,
            self.depth,
            self.error_layers,
            self.turns,
        )
        object.__setattr__(self, "scorer", scorer)

    @property
    def namespace(self) -> Namespace:
        """The memory that is read."""
        return self.memory.namespace

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
