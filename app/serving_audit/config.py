"""The application that is audited, as its Serve config describes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.args import AppArgs, deployment_name
from app.yaml_file import read_yaml
from stages.request import STAGES

IMPORT_PATH = "app.build:build_app"


def read_app_args(path: Path) -> AppArgs:
    """The args of the one application of this project in a Serve config, with the live settings of
    its ``deployments`` in the place of those that the arms start with.

    Raises:
        ValueError: the file is no such config, or its args are wrong.
    """
    config = read_yaml(path)
    applications = config.get("applications") if isinstance(config, dict) else None
    found = [
        application
        for application in applications or []
        if isinstance(application, dict) and application.get("import_path") == IMPORT_PATH
    ]
    if len(found) != 1:
        raise ValueError(
            f"{path} must be a Serve config with one application of {IMPORT_PATH}, got {len(found)}"
        )
    try:
        return _with_live_settings(
            AppArgs.model_validate(found[0].get("args") or {}), found[0].get("deployments") or []
        )
    except ValidationError as error:
        raise ValueError(f"args in {path}: {error}") from error


def _with_live_settings(args: AppArgs, deployments: list[dict[str, Any]]) -> AppArgs:
    live = {one["name"]: one["user_config"] for one in deployments if "user_config" in one}
    stages: dict[str, Any] = {}
    for stage in STAGES:
        variants = {
            name: variant.model_copy(
                update={"user_config": live.get(deployment_name(stage, name), variant.user_config)}
            )
            for name, variant in args.stage(stage).variants.items()
        }
        stages[stage] = args.stage(stage).model_copy(update={"variants": variants})
    return args.model_copy(update=stages)
