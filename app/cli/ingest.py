"""``marm ingest``: a published data set or your own Parquet into the event log."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from app.cli.options import DEFAULT_HOME, AddressOption, HomeOption
from app.cli.session import console, progress_bar, ray_session
from cache_actors.home import Home
from train.data.column_map import parse_column_map
from train.data.ingest import FORMATS, ingest, open_source_of


def ingest_command(
    path: Annotated[str, typer.Argument(help="File, directory or glob.")],
    format_: Annotated[
        str, typer.Option("--format", help=f"Layout of the data: {', '.join(FORMATS)}.")
    ],
    map_: Annotated[
        list[str] | None,
        typer.Option("--map", help="field=column for a parquet, e.g. long_view=label. Repeatable."),
    ] = None,
    home: HomeOption = DEFAULT_HOME,
    timestamp_unit: Annotated[
        str, typer.Option("--timestamp-unit", help="auto, s, ms or us.")
    ] = "auto",
    again: Annotated[
        bool, typer.Option("--again", help="Append a source that is already in the log.")
    ] = False,
    address: AddressOption = None,
) -> None:
    """Read events and items into the log of a deployment; prints a report as JSON."""
    target, column_map = Home(home), parse_column_map(map_ or [])
    open_source_of(format_, path, column_map, timestamp_unit)  # refuses before anything is started
    with ray_session(address), progress_bar() as bars:
        task = bars.add_task("starting", total=None, note="")

        def show(stage: str, amount: int) -> None:
            bars.update(task, description=stage, completed=amount)

        report = ingest(
            target,
            format_,
            path,
            column_map,
            timestamp_unit=timestamp_unit,
            again=again,
            progress=show,
        )
    console.print(f"kept {report.rows_kept:,} of {report.rows_read:,} rows")
    typer.echo(json.dumps(report.to_dict()))
