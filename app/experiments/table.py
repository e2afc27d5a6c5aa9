"""Which arms serve a user: nested buckets under independent salts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from app.experiments.args import ExperimentArgs, RoutingArgs
from app.experiments.assignment import Assignment
from app.experiments.buckets import ab_bucket, nested_layout, unit_position
from app.experiments.knobs import with_knobs
from app.experiments.overrides import OverrideRules
from stages.request import STAGES, StageName


def server_time_ms() -> int:
    """The server's time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class StageSplit:
    """The experiment of one stage, ready to look users up in."""

    key: str
    salt: str
    settings: ExperimentArgs
    arm_of: tuple[str, ...]  # [NUM_AB_BUCKETS], by bucket

    @staticmethod
    def of(salt: str, key: str, settings: ExperimentArgs) -> StageSplit:
        """Lay the arms of an experiment out."""
        names = sorted(settings.arms)
        layout = nested_layout(settings.arms, settings.control_arm).tolist()
        arm_of = tuple(names[index] for index in layout)
        return StageSplit(key, f"{salt}:experiment:{key}", settings, arm_of)

    def arm(self, user_id: int, time_ms: int) -> str | None:
        """The user's arm at a time; None for users who don't take part."""
        # Taking part and the arm are drawn apart: a growing share changes nobody's arm.
        if unit_position(f"{self.salt}:share", user_id) >= self.settings.share_at(time_ms):
            return None
        return self.arm_of[ab_bucket(f"{self.salt}:arm", user_id)]


class ExperimentTable:
    """The arms of every user, under one set of settings. A pure function of user, time and salts,
    so every replica of the ingress says the same."""

    def __init__(
        self,
        routing: RoutingArgs,
        variants: Mapping[StageName, tuple[str, ...]],
        clock_ms: Callable[[], int] = server_time_ms,
    ) -> None:
        """``variants`` are the arms that each stage has.

        Raises:
            ValueError: the settings name an arm that is none.
        """
        routing.check_arms(variants)
        self._routing = routing
        self._controls = routing.controls(variants)
        self._rules = OverrideRules(routing.overrides, variants)
        self._clock_ms = clock_ms
        self._splits: dict[StageName, StageSplit] = {
            experiment.stage: StageSplit.of(routing.salt, key, experiment)
            for key, experiment in routing.experiments.items()
        }

    def assign(
        self, user_id: int, overrides: Mapping[StageName, str], role: str | None = None
    ) -> Assignment:
        """The arms of one request.

        Args:
            overrides: arms that the caller asks for, by stage.
            role: role of the caller's API key.

        Raises:
            ForbiddenError: overrides that the caller may not make.
            RefusedError: an override by an arm that does not exist.
        """
        self._rules.check(overrides, user_id, role)
        arms, experiments = dict(self._controls), dict[StageName, str]()
        holdout = self._in_holdout(user_id)
        if not holdout:
            now_ms = self._clock_ms()
            for stage, split in self._splits.items():
                arm = split.arm(user_id, now_ms)
                if arm is not None:
                    arms[stage], experiments[stage] = arm, split.key
        for stage, arm in overrides.items():
            arms[stage] = arm
            experiments.pop(stage, None)
        popular = holdout and not overrides and self._routing.holdout.serves == "popular"
        return Assignment(
            arms=arms,
            experiments=experiments,
            holdout=holdout,
            overridden=tuple(stage for stage in STAGES if stage in overrides),
            shadows={} if popular else self._shadows(user_id, arms),
            popular=popular,
        )

    def _in_holdout(self, user_id: int) -> bool:
        holdout = self._routing.holdout
        salt = f"{self._routing.salt}:holdout:{holdout.salt}"
        return unit_position(salt, user_id) < holdout.share

    def _shadows(
        self, user_id: int, arms: Mapping[StageName, str]
    ) -> dict[StageName, tuple[str, ...]]:
        found: dict[StageName, tuple[str, ...]] = {}
        for stage, shadow in self._routing.shadows.items():
            others = tuple(arm for arm in shadow.arms if arm != arms[stage])
            salt = f"{self._routing.salt}:shadow:{stage}"
            if others and unit_position(salt, user_id) < shadow.share:
                found[stage] = others
        return found


def experiment_table(
    routing: RoutingArgs,
    variants: Mapping[StageName, tuple[str, ...]],
    user_config: Mapping[str, Any],
) -> ExperimentTable:
    """The table of the args and the live settings as written.

    Raises:
        ValueError: the settings make no sense; the message says which.
    """
    return ExperimentTable(with_knobs(routing, user_config), variants)
