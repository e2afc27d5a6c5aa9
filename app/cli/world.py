"""``marm world``: a simulated short-video service writes the event log."""

from __future__ import annotations

from typing import Annotated

import typer

from app.cli.options import DEFAULT_HOME, HomeOption
from app.cli.session import console, progress_bar
from cache_actors.home import Home
from train.data.world import write_world
from train.data.world_config import WorldConfig


def world_command(
    home: HomeOption = DEFAULT_HOME,
    users: Annotated[int, typer.Option(help="Number of users.")] = 2_000,
    items: Annotated[int, typer.Option(help="Number of items.")] = 4_000,
    events: Annotated[int, typer.Option(help="Number of exposures.")] = 200_000,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal worlds.")] = 0,
    again: Annotated[
        bool, typer.Option("--again", help="Append a world that is already in the log.")
    ] = False,
) -> None:
    """Simulate users with drifting interests and append what they did to the log."""
    config = WorldConfig(num_users=users, num_items=items, num_events=events, seed=seed)
    simulate(Home(home).create(), config, again)
    console.print(f"wrote {events:,} events of {users:,} users to {Home(home).log}")


def simulate(home: Home, config: WorldConfig, again: bool = False) -> None:
    """Write a world into the log of ``home`` with a progress bar."""
    with progress_bar() as bars:
        task = bars.add_task("simulating", total=config.num_events, note="")
        write_world(
            home,
            config,
            lambda stage, amount: bars.update(task, description=stage, completed=amount),
            again=again,
        )
