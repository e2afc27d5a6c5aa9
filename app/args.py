"""Arguments of `build_app`, as written in ``serve_config.yaml``. Unknown keys are refused.

A change here restarts replicas; what may change while serving is Serve's ``user_config`` (see
`stages.knobs` and `app.ab`).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from app.ab import arm_table
from app.memory_args import MemoryArgs
from app.strict import Name, Strict
from stages.graph import StageLimits
from stages.item_index import INDEX_KINDS
from stages.knobs import CascadingKnobs, RankingKnobs, RetrievalKnobs, StageKnobs
from stages.request import STAGES, StageName

PositiveInt = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, le=3600)]

KNOBS: dict[StageName, type[StageKnobs]] = {
    "retrieval": RetrievalKnobs,
    "cascading": CascadingKnobs,
    "ranking": RankingKnobs,
}


class VariantArgs(Strict):
    """One arm of a stage: a deployment of its own, named ``<stage>-<arm>``."""

    model: Name | None = None
    """The published variant that it serves; the arm's own name when not given."""
    index: str = "exact"
    """Kind of item index (retrieval)."""
    user_config: dict[str, Any] = Field(default={})
    """Initial live settings, see `stages.knobs`."""
    num_replicas: PositiveInt = 1
    num_cpus: Annotated[float, Field(ge=0)] = 0.25
    """CPUs reserved per replica; torch uses as many threads, at least one."""
    max_ongoing_requests: PositiveInt = 32
    max_queued_requests: PositiveInt = 256
    poll_s: Seconds = 1.0
    """How often to look for a new version."""


class StageArgs(Strict):
    """One stage of the chain: its arms, how many candidates leave it, how long it may take."""

    variants: dict[Name, VariantArgs] = Field(default={"default": VariantArgs()})
    candidates: Annotated[int, Field(ge=1, le=10_000)] = 200
    timeout_ms: PositiveInt = 1000

    @model_validator(mode="after")
    def _has_variants(self) -> StageArgs:
        if not self.variants:
            raise ValueError("a stage needs at least one variant, got none; name one")
        return self


class IngressArgs(Strict):
    """Replicas of the HTTP edge."""

    num_replicas: PositiveInt = 1
    num_cpus: Annotated[float, Field(ge=0)] = 0.25
    max_ongoing_requests: PositiveInt = 64
    max_queued_requests: PositiveInt = 256
    poll_s: Seconds = 1.0
    """How often to look at the stages, the catalog and the popular items."""
    user_config: dict[str, Any] = Field(default={})
    """Initial live settings, see `app.ab.IngressKnobs`."""


class LimitArgs(Strict):
    """What one request may ask for, and how long it may take."""

    default_k: PositiveInt = 20
    max_k: Annotated[int, Field(ge=1, le=1000)] = 200
    deadline_ms: PositiveInt = 2500
    max_body_bytes: Annotated[int, Field(ge=1024)] = 1 << 20
    max_clock_skew_ms: Annotated[int, Field(ge=0)] = 300_000
    """How far in the future a client's time stamp may lie."""
    feedback_timeout_s: Seconds = 5.0

    @model_validator(mode="after")
    def _default_within_max(self) -> LimitArgs:
        if self.default_k > self.max_k:
            raise ValueError(
                f"default_k must be at most max_k={self.max_k}, got {self.default_k}; lower it"
            )
        return self


class AppArgs(Strict):
    """Everything that `build_app` needs."""

    home: Annotated[str, Field(min_length=1)] = "marm-home"
    """Directory of the deployment; relative to where ``serve run`` was started."""
    memory: MemoryArgs = MemoryArgs()
    retrieval: StageArgs = StageArgs(candidates=1000)
    cascading: StageArgs = StageArgs(candidates=200)
    ranking: StageArgs = StageArgs(candidates=200)
    ingress: IngressArgs = IngressArgs()
    limits: LimitArgs = LimitArgs()

    @model_validator(mode="after")
    def _live_settings(self) -> AppArgs:
        arm_table(self.ingress.user_config, self.arms())
        for stage in STAGES:
            for name, variant in self.stage(stage).variants.items():
                KNOBS[stage].model_validate(variant.user_config)
                if variant.index not in INDEX_KINDS:
                    raise ValueError(
                        f"{stage}.variants.{name}.index must be one of {sorted(INDEX_KINDS)}, "
                        f"got {variant.index!r}"
                    )
        return self

    def stage(self, stage: StageName) -> StageArgs:
        """The settings of one stage."""
        by_name: dict[StageName, StageArgs] = {
            "retrieval": self.retrieval,
            "cascading": self.cascading,
            "ranking": self.ranking,
        }
        return by_name[stage]

    def arms(self) -> dict[StageName, tuple[str, ...]]:
        """Names of the variants of every stage."""
        return {stage: tuple(self.stage(stage).variants) for stage in STAGES}

    def stage_limits(self) -> dict[StageName, StageLimits]:
        """Candidate counts and timeouts for the stage graph."""
        return {
            stage: StageLimits(self.stage(stage).candidates, self.stage(stage).timeout_ms)
            for stage in STAGES
        }


def deployment_name(stage: StageName, variant: str) -> str:
    """Name of a stage variant's deployment."""
    return f"{stage}-{variant}"
