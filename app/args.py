"""Arguments of `build_app`, as written in ``serve_config.yaml``. Unknown keys are refused.

A change here restarts replicas; what may change while serving is Serve's ``user_config`` (see
`stages.knobs` and `app.experiments.knobs`).
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field, model_validator

from app.experiments.args import RoutingArgs
from app.experiments.table import experiment_table
from app.load_args import LoadArgs, ReplicaArgs
from app.memory_args import MemoryArgs
from app.scoring_args import SCORING_FIELDS, ScoringArgs
from app.security_args import SecurityArgs
from app.strict import Name, Strict
from stages.grouped_calls import GroupLimits
from stages.index_args import ExactIndexArgs, IndexArgs
from stages.knobs import CascadingKnobs, RankingKnobs, RetrievalKnobs, StageKnobs
from stages.request import STAGES, StageName
from stages.stage_arms import StageLimits

PositiveInt = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, le=3600)]
Share = Annotated[float, Field(gt=0, le=1)]

BUDGET_SHARES: dict[StageName, float] = {"retrieval": 0.5, "cascading": 0.5, "ranking": 0.9}
"""Share of the time left that a stage may take; what ranking leaves is for making the answer."""

KNOBS: dict[StageName, type[StageKnobs]] = {
    "retrieval": RetrievalKnobs,
    "cascading": CascadingKnobs,
    "ranking": RankingKnobs,
}


class VariantArgs(ScoringArgs, ReplicaArgs):
    """One arm of a stage: a deployment of its own, named ``<stage>-<arm>``."""

    model: Name | None = None
    """The published variant that it serves; the arm's own name when not given."""
    index: IndexArgs = ExactIndexArgs()
    """Item index (retrieval): the name of a kind, or a section with its parameters."""
    user_config: dict[str, Any] = Field(default={})
    """Initial live settings, see `stages.knobs`."""
    poll_s: Seconds = 1.0
    """How often to look for a new version."""
    calls_under_way: PositiveInt | None = None
    """Calls of the arm that an ingress replica has under way at once; requests that come meanwhile
    share the next one. When not given: one for each of one or two replicas and two for each of
    more, for Serve finds an idle one among many by chance; with ``autoscaling`` as many as keep
    ``max_replicas`` at their target."""

    @model_validator(mode="after")
    def _autoscaler_sees_the_load(self) -> VariantArgs:
        needed = self._calls_to_scale_up()
        if self.calls_under_way is not None and self.calls_under_way < needed:
            raise ValueError(
                f"calls_under_way must be at least {needed} (max_replicas times "
                f"target_ongoing_requests), got {self.calls_under_way}; with fewer, requests would "
                "share calls before there are as many replicas as there may be"
            )
        return self

    def group_limits(self) -> GroupLimits:
        """How requests of this arm share calls."""
        replicas = self.num_replicas or 1
        calls = self._calls_to_scale_up() or (replicas if replicas <= 2 else 2 * replicas)
        return GroupLimits(self.calls_under_way or calls, waiting=self.max_queued_requests)

    def _calls_to_scale_up(self) -> int:
        """Calls under way at which Serve starts every replica that it may; 0 where their number is
        fixed."""
        scaling = self.autoscaling
        if scaling is None:
            return 0
        return math.ceil(scaling.max_replicas * scaling.target_ongoing_requests)


class StageArgs(Strict):
    """One stage of the chain: its arms, how many candidates leave it, how long it may take."""

    variants: dict[Name, VariantArgs] = Field(default={"default": VariantArgs()})
    candidates: Annotated[int, Field(ge=1, le=10_000)] = 200
    timeout_ms: PositiveInt = 1000
    budget_share: Share | None = None
    """Of the time left before the deadline, what the stage may take (`BUDGET_SHARES` when not
    given); never more than ``timeout_ms``."""
    control_share: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Of the stage's time, what is kept for the control arm in case that another arm is lost."""

    @model_validator(mode="after")
    def _has_variants(self) -> StageArgs:
        if not self.variants:
            raise ValueError("a stage needs at least one variant, got none; name one")
        return self


class IngressArgs(ReplicaArgs):
    """Replicas of the HTTP edge."""

    max_ongoing_requests: PositiveInt = 256
    """More than ``load.admission`` lets in, so that it is the edge that refuses, with a reason."""
    poll_s: Seconds = 1.0
    """How often to look at the stages, the catalog and the popular items."""
    user_config: dict[str, Any] = Field(default={})
    """Initial live settings, see `app.experiments.knobs`."""


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
    load: LoadArgs = LoadArgs()
    routing: RoutingArgs = RoutingArgs()
    security: SecurityArgs = SecurityArgs()

    @model_validator(mode="after")
    def _edge_sees_the_load(self) -> AppArgs:
        admission = self.load.admission
        let_in = admission.max_concurrent + admission.max_concurrent_feedback
        if self.ingress.max_ongoing_requests <= let_in:
            raise ValueError(
                f"ingress.max_ongoing_requests must be above {let_in} (what load.admission lets "
                f"in), got {self.ingress.max_ongoing_requests}; requests would wait where nobody "
                "can refuse them"
            )
        return self

    @model_validator(mode="after")
    def _live_settings(self) -> AppArgs:
        experiment_table(self.routing, self.arms(), self.ingress.user_config)
        for stage in STAGES:
            for name, variant in self.stage(stage).variants.items():
                KNOBS[stage].model_validate(variant.user_config)
                if stage != "retrieval" and "index" in variant.model_fields_set:
                    raise ValueError(
                        f"only variants of retrieval have an item index, got one in "
                        f"{stage}.variants.{name}; remove it"
                    )
                given = sorted(variant.model_fields_set.intersection(SCORING_FIELDS))
                if stage == "retrieval" and given:
                    raise ValueError(
                        f"variants of retrieval score no candidates, got {given} in "
                        f"{stage}.variants.{name}; remove them"
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

    def controls(self) -> dict[StageName, str]:
        """The control arm of every stage."""
        return self.routing.controls(self.arms())

    def stage_limits(self) -> dict[StageName, StageLimits]:
        """Candidate counts and timeouts for the stage graph."""
        return {stage: self._limits_of(stage) for stage in STAGES}

    def _limits_of(self, stage: StageName) -> StageLimits:
        args = self.stage(stage)
        return StageLimits(
            candidates=args.candidates,
            timeout_ms=args.timeout_ms,
            budget_share=args.budget_share or BUDGET_SHARES[stage],
            control_share=args.control_share,
        )


def deployment_name(stage: StageName, variant: str) -> str:
    """Name of a stage variant's deployment."""
    return f"{stage}-{variant}"
