"""Settings of experiments that change while serving (Serve's ``user_config`` of the ingress)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError

from app.experiments.args import ExperimentArgs, RampArgs, RoutingArgs, ShadowArgs, Share
from app.strict import Name, Strict
from stages.request import StageName


class ExperimentKnobs(Strict):
    """What changes of one experiment; what is not given stays as the args say."""

    arms: dict[Name, Share] | None = None
    """New weights, of all arms."""
    share: Share | None = None
    ramp: RampArgs | None = None
    """``null`` takes the ramp of the args away."""


class RoutingKnobs(Strict):
    """Live settings of routing. They replace what was set live before, not add to it."""

    experiments: dict[Name, ExperimentKnobs] = Field(default={})
    shadows: dict[StageName, ShadowArgs] | None = None


def with_knobs(routing: RoutingArgs, user_config: Mapping[str, Any]) -> RoutingArgs:
    """The settings of the args, changed by live ones.

    Raises:
        ValueError: an unknown experiment or arm, or settings that make no sense.
    """
    try:
        knobs = RoutingKnobs.model_validate(dict(user_config))
    except ValidationError as error:
        raise ValueError(f"user_config of the ingress: {in_one_line(error)}") from error
    unknown = sorted(set(knobs.experiments) - set(routing.experiments))
    if unknown:
        raise ValueError(
            f"user_config.experiments names {unknown}, but args.routing declares "
            f"{sorted(routing.experiments)}; declare an experiment there before changing it live"
        )
    experiments = {
        key: _changed(key, declared, knobs.experiments.get(key, ExperimentKnobs()))
        for key, declared in routing.experiments.items()
    }
    changed_shadows = routing.shadows if knobs.shadows is None else knobs.shadows
    return routing.model_copy(update={"experiments": experiments, "shadows": changed_shadows})


def _changed(key: str, declared: ExperimentArgs, knobs: ExperimentKnobs) -> ExperimentArgs:
    given = {name: getattr(knobs, name) for name in knobs.model_fields_set}
    for name in ("arms", "share"):
        if name in given and given[name] is None:
            raise ValueError(
                f"user_config.experiments.{key}.{name} must be given a value or left out, got null"
            )
    if "arms" in given and set(given["arms"]) != set(declared.arms):
        raise ValueError(
            f"user_config.experiments.{key}.arms must give the weight of each of "
            f"{sorted(declared.arms)}, got {sorted(given['arms'])}; give 0 to an arm for nobody"
        )
    # The control is the one of the args, however the live weights are ordered.
    merged = {**dict(declared), "control": declared.control_arm, **given}
    try:
        return ExperimentArgs.model_validate(merged)
    except ValidationError as error:
        raise ValueError(f"user_config.experiments.{key}: {in_one_line(error)}") from error


def in_one_line(error: ValidationError) -> str:
    """Place and message of everything that is wrong."""
    found = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        found.append(f"{where}: {message}" if where else message)
    return "; ".join(found)
