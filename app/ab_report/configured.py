"""Controls and weights of experiments, from a Serve config or as options of a command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.experiments.args import RoutingArgs
from app.experiments.knobs import with_knobs
from app.yaml_file import read_yaml

_INGRESS = "ingress"


def read_routing(path: Path) -> RoutingArgs:
    """``routing`` of a Serve config with the live settings that the file gives the ingress.

    Weights that were changed live without the file are not known to it. Raises ValueError for what
    is no Serve config, or one with several applications that route.
    """
    content = read_yaml(path)
    applications = content.get("applications") if isinstance(content, dict) else None
    if not isinstance(applications, list):
        raise ValueError(
            f"{path} must be a Serve config with 'applications'; see serve_config.yaml"
        )
    found = [app for app in applications if "routing" in _mapping(_mapping(app).get("args"))]
    if len(found) > 1:
        raise ValueError(f"{path} has {len(found)} applications with 'routing', expected one")
    if not found:
        return RoutingArgs()
    try:
        routing = RoutingArgs.model_validate(found[0]["args"]["routing"])
        return with_knobs(routing, _ingress_settings(found[0]))
    except ValidationError as error:
        raise ValueError(f"routing in {path}: {error}") from error


def configured_controls(routing: RoutingArgs) -> dict[str, str]:
    """The control arm of every experiment."""
    return {key: settings.control_arm for key, settings in routing.experiments.items()}


def configured_weights(routing: RoutingArgs) -> dict[str, dict[str, float]]:
    """The weights of the arms of every experiment."""
    return {key: dict(settings.arms) for key, settings in routing.experiments.items()}


def parse_controls(options: Sequence[str]) -> dict[str, str]:
    """``EXPERIMENT=ARM``, or ``ARM`` alone (key "") for experiments that are not named."""
    controls: dict[str, str] = {}
    for option in options:
        experiment, _, arm = option.rpartition("=")
        if not arm or experiment in controls:
            raise ValueError(
                f"--control must be ARM or EXPERIMENT=ARM, once for each, got {option!r}"
            )
        controls[experiment.strip()] = arm.strip()
    return controls


def parse_weights(options: Sequence[str]) -> dict[str, dict[str, float]]:
    """``EXPERIMENT:ARM=WEIGHT,ARM=WEIGHT``, by experiment."""
    weights: dict[str, dict[str, float]] = {}
    for option in options:
        experiment, colon, listed = option.partition(":")
        pairs = [pair.partition("=") for pair in listed.split(",")]
        try:
            parsed = {arm.strip(): float(weight) for arm, _, weight in pairs}
        except ValueError:
            parsed = {}
        names_missing = not experiment or not all(parsed)
        if not colon or names_missing or len(parsed) != len(pairs) or experiment in weights:
            raise ValueError(
                "--weights must be EXPERIMENT:ARM=WEIGHT,ARM=WEIGHT,..., once for each experiment, "
                f"got {option!r}"
            )
        weights[experiment] = parsed
    return weights


def _ingress_settings(application: Mapping[str, Any]) -> Mapping[str, Any]:
    """What Serve gives the ingress: that of the deployment, else that of the args."""
    for deployment in application.get("deployments") or []:
        settings = _mapping(deployment)
        if settings.get("name") == _INGRESS and "user_config" in settings:
            return _mapping(settings["user_config"])
    return _mapping(_mapping(application["args"].get(_INGRESS)).get("user_config"))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
