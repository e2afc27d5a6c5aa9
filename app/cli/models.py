"""``marm models``: published versions, and which of them serves."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from app.cli.options import DEFAULT_HOME, HomeOption
from cache_actors.home import Home
from cache_actors.registry import ModelRegistry
from cache_actors.rollback import find_rollback
from marm.config import STAGES

models_app = typer.Typer(
    help="Published models. Running servers follow within their poll_s (1 s by default).",
    no_args_is_help=True,
)

StageArgument = Annotated[str, typer.Argument(help=f"One of {', '.join(STAGES)}.")]
VariantArgument = Annotated[str, typer.Argument(help="Published variant, such as 'default'.")]


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
    stage: StageArgument,
    variant: VariantArgument,
    version: Annotated[int, typer.Argument(min=1, help="Version to serve.")],
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Serve one version from now on, whatever is published later."""
    ModelRegistry(Home(home).models).pin(stage, variant, version)
    _say(stage, variant, pinned=version)


@models_app.command()
def unpin(stage: StageArgument, variant: VariantArgument, home: HomeOption = DEFAULT_HOME) -> None:
    """Serve the newest version again."""
    registry = ModelRegistry(Home(home).models)
    if not registry.versions(stage, variant):
        raise ValueError(
            f"no version of {stage}/{variant} is published in {Home(home).models}; "
            "`marm models list` shows what is"
        )
    registry.pin(stage, variant, None)
    _say(stage, variant, pinned=None)


@models_app.command()
def rollback(
    stage: StageArgument, variant: VariantArgument, home: HomeOption = DEFAULT_HOME
) -> None:
    """Serve the version that served before this one; it stays pinned until `marm models unpin`."""
    registry = ModelRegistry(Home(home).models)
    rolled = find_rollback(registry, stage, variant)
    registry.pin(stage, variant, rolled.to_version)
    _say(stage, variant, rolled_back=rolled.from_version, pinned=rolled.to_version)


def _say(stage: str, variant: str, **more: int | None) -> None:
    typer.echo(json.dumps({"stage": stage, "variant": variant, **more}))
