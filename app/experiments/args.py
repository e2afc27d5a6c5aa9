"""Settings of experiments, as written under ``routing`` in the args of ``serve_config.yaml``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, model_validator

from app.api_keys import Role
from app.experiments.buckets import NUM_AB_BUCKETS
from app.strict import Name, Strict
from stages.request import STAGES, StageName

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
UserId = Annotated[int, Field(ge=0, le=2**63 - 1)]
PositiveInt = Annotated[int, Field(ge=1)]

WEIGHT_TOLERANCE = 1e-6
"""By how much weights may miss a sum of 1, so that three times 0.333333 is accepted."""


class RampArgs(Strict):
    """Growth of an experiment's share by schedule: none before ``start``, then from ``from_share``
    in a straight line to the experiment's ``share`` at ``end``, where it stays."""

    start: AwareDatetime
    end: AwareDatetime
    from_share: Share = 0.0

    @model_validator(mode="after")
    def _in_order(self) -> RampArgs:
        if self.end <= self.start:
            raise ValueError(
                f"a ramp must end after its start {self.start.isoformat()}, got "
                f"{self.end.isoformat()}"
            )
        return self


class ExperimentArgs(Strict):
    """Users of one stage split between arms, each a variant of the stage."""

    stage: StageName
    arms: dict[Name, Share]
    """Share of each arm among the users who take part; they sum to 1."""
    control: Name | None = None
    """The arm of everybody who does not take part; the first arm when not given."""
    share: Share = 1.0
    """The share of users who take part."""
    ramp: RampArgs | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> ExperimentArgs:
        if len(self.arms) < 2:
            raise ValueError(f"an experiment needs at least two arms, got {list(self.arms)}")
        total = math.fsum(self.arms.values())
        if abs(total - 1.0) > WEIGHT_TOLERANCE:
            raise ValueError(
                f"the weights of arms must sum to 1, got {self.arms}, which sum to {total:.6g}"
            )
        tiny = {arm: weight for arm, weight in self.arms.items() if 0 < weight < 1 / NUM_AB_BUCKETS}
        if tiny:
            raise ValueError(
                f"a weight must be 0 or at least {1 / NUM_AB_BUCKETS}, got {tiny}; lower 'share' "
                "instead to expose fewer users"
            )
        if self.control is not None and self.control not in self.arms:
            raise ValueError(
                f"control must be one of the arms {list(self.arms)}, got {self.control!r}"
            )
        if self.ramp is not None and self.ramp.from_share > self.share:
            raise ValueError(
                f"a ramp grows: from_share must be at most share={self.share}, got "
                f"{self.ramp.from_share}"
            )
        return self

    @property
    def control_arm(self) -> str:
        """The arm that the others are compared with."""
        return next(iter(self.arms)) if self.control is None else self.control

    def share_at(self, time_ms: int) -> float:
        """The share of users who take part at a time (milliseconds since 1970)."""
        if self.ramp is None:
            return self.share
        start_ms = self.ramp.start.timestamp() * 1000
        end_ms = self.ramp.end.timestamp() * 1000
        if time_ms < start_ms:
            return 0.0
        progress = min(1.0, (time_ms - start_ms) / (end_ms - start_ms))
        return self.ramp.from_share + progress * (self.share - self.ramp.from_share)


class HoldoutArgs(Strict):
    """Users who take part in no experiment, to see what all of them together are worth."""

    share: Share = 0.0
    serves: Literal["control", "popular"] = "control"
    """The control arm of every stage, or popular items without asking any stage."""
    salt: Name = "holdout"
    """Another one draws other users."""


class ShadowArgs(Strict):
    """Arms that are asked what another one answers, to see how they do; nobody sees their items."""

    arms: Annotated[tuple[Name, ...], Field(min_length=1)]
    share: Share = 1.0
    """The share of users whose requests are repeated."""


class ShadowLimitArgs(Strict):
    """How much an ingress replica spends on shadow arms; what does not fit is dropped."""

    max_running: PositiveInt = 2
    max_waiting: PositiveInt = 32


class OverrideArgs(Strict):
    """Who may choose arms with the header ``X-MARM-Arms``; nobody when empty."""

    user_ids: tuple[UserId, ...] = ()
    """Requests for these users."""
    roles: tuple[Role, ...] = ()
    """Requests with an API key of one of these roles."""


class ExposureArgs(Strict):
    """How an ingress replica buffers exposures before it writes them."""

    max_rows: PositiveInt = 2000
    """Rows of a segment."""
    max_age_s: Annotated[float, Field(gt=0, le=3600)] = 5.0
    """How long a row waits; what a killed replica loses."""
    max_buffered: PositiveInt = 20_000
    """Rows that wait when the disk does not keep up; later ones are dropped and counted."""

    @model_validator(mode="after")
    def _room_for_a_segment(self) -> ExposureArgs:
        if self.max_buffered < self.max_rows:
            raise ValueError(
                f"max_buffered must be at least max_rows={self.max_rows}, got {self.max_buffered}"
            )
        return self


class RoutingArgs(Strict):
    """Which arm serves whom, and what is remembered of it."""

    salt: Annotated[str, Field(min_length=1, max_length=64)] = "marm"
    """Of the deployment; another one shuffles all users of all experiments."""
    experiments: dict[Name, ExperimentArgs] = Field(default={})
    """By key. A key is a salt, too: an experiment under a new key gets a new split of users."""
    holdout: HoldoutArgs = HoldoutArgs()
    shadows: dict[StageName, ShadowArgs] = Field(default={})
    shadow_limits: ShadowLimitArgs = ShadowLimitArgs()
    overrides: OverrideArgs = OverrideArgs()
    exposures: ExposureArgs = ExposureArgs()

    @model_validator(mode="after")
    def _one_experiment_per_stage(self) -> RoutingArgs:
        for stage in STAGES:
            keys = [key for key, found in self.experiments.items() if found.stage == stage]
            if len(keys) > 1:
                raise ValueError(
                    f"a stage takes one experiment at a time, but {keys} are all on {stage}; "
                    "remove all but one, or make their arms arms of one experiment"
                )
        return self

    def experiment_on(self, stage: StageName) -> tuple[str, ExperimentArgs] | None:
        """Key and settings of the experiment on a stage."""
        found = ((key, it) for key, it in self.experiments.items() if it.stage == stage)
        return next(found, None)

    def controls(self, variants: Mapping[StageName, tuple[str, ...]]) -> dict[StageName, str]:
        """The control arm of every stage: its experiment's, or else its first variant."""
        controls: dict[StageName, str] = {}
        for stage in STAGES:
            found = self.experiment_on(stage)
            controls[stage] = variants[stage][0] if found is None else found[1].control_arm
        return controls

    def check_arms(self, variants: Mapping[StageName, tuple[str, ...]]) -> None:
        """Raise ValueError where an experiment or shadow names what is not a variant."""
        for key, experiment in self.experiments.items():
            where = f"routing.experiments.{key}.arms"
            _check_known(where, experiment.stage, experiment.arms, variants)
        for stage, shadow in self.shadows.items():
            _check_known(f"routing.shadows.{stage}.arms", stage, shadow.arms, variants)


def _check_known(
    where: str,
    stage: StageName,
    arms: Mapping[str, float] | tuple[str, ...],
    variants: Mapping[StageName, tuple[str, ...]],
) -> None:
    unknown = sorted(set(arms) - set(variants[stage]))
    if unknown:
        raise ValueError(
            f"{where} names {unknown}, but {stage} has the variants {list(variants[stage])}; add a "
            "variant or rename the arm"
        )
