"""Ranking: the long history scores every candidate on every task in one pass."""

from __future__ import annotations

from dataclasses import dataclass, field

from marm.memory import Namespace
from stages.history import MemoryReader
from stages.knobs import RankingKnobs
from stages.models import ScoringModel, check_scores
from stages.request import StageRequest, StageResult
from stages.scoring import CandidateScorer
from stages.turns import Turns


@dataclass(frozen=True)
class RankingStage:
    """One loaded version of a ranking model. Serving reads its memory and never writes it."""

    variant: str
    version: int
    model: ScoringModel
    memory: MemoryReader
    history_length: int
    depth: int
    tasks: tuple[str, ...]
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
