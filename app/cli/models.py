"""``marm models``: published versions, and rolling back to one."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from app.cli.options import DEFAULT_HOME, HomeOption
from cache_actors.home import Home
from cache_actors.registry import ModelRegistry
from marm.config import STAGES

models_app = typer.Typer(help="Published models.", no_args_is_help=True)


@models_app.command("list")
def list_models(home: HomeOption = DEFAULT_HOME) -> None:
    """Versions of every stage and variant, one JSON line each."""
    registry = ModelRegistry(Home(home).models)
    for stage in STAGES:
        for variant in registry.variants(stage):
            line = {
                "stage": stage,
                "variant": variant,
                "versions": registry.versions(stage, variant),
                "serving": registry.latest(stage, variant),
                "pinned": registry.pinned(stage, variant),
            }
            typer.echo(json.dumps(line))


@models_app.command()
def pin(
    stage: Annotated[str, typer.Argument(help=f"One of {', '.join(STAGES)}.")],
    version: Annotated[int, typer.Argument(min=0, help="Version to serve; 0 unpins.")],
    variant: Annotated[str, typer.Option(help="Published variant.")] = "default",
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Serve one version from now on (roll back), or the newest again."""
    registry = ModelRegistry(Home(home).models)
    registry.pin(stage, variant, version or None)
    typer.echo(json.dumps({"stage": stage, "variant": variant, "pinned": version or None}))
