"""``marm audit serving``: do served scores equal those that training computes?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from app.args import AppArgs
from app.cli.memory.pools import opened_pool
from app.cli.options import DEFAULT_HOME, AddressOption, HomeOption
from app.cli.session import console, to_json
from app.serving_audit.config import read_app_args
from app.serving_audit.report import AuditReport
from app.serving_audit.run import AuditSize, ServingAudit
from cache_actors.home import Home

audit_app = typer.Typer(help="Checks of what runs against what should.", no_args_is_help=True)


@audit_app.callback()
def audit() -> None:
    """Checks of what runs against what should."""


@audit_app.command("serving")
def serving_command(
    home: HomeOption = DEFAULT_HOME,
    users: Annotated[int, typer.Option(min=1, help="Users with rows to sample.")] = 20,
    items: Annotated[
        int, typer.Option(min=2, max=200, help="Items per user and moment, or k over HTTP.")
    ] = 50,
    url: Annotated[
        str | None,
        typer.Option(
            help="The running application, such as http://127.0.0.1:8000: compare its "
            "answers. Default: assemble every arm in this process."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="The Serve config that describes the arms; default: one arm each."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="MARM_API_KEY", help="Sent to the application.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample.")] = 0,
    address: AddressOption = None,
) -> None:
    """Score the same users, items, moments and versions both ways; the greatest difference.

    Passes when no score differs by more than 1e-4 (more for arms in half precision, which the
    output states). Reads only. A table for people, and one JSON object; exit code 1 when a score
    differs, or when nothing could be compared.
    """
    target = Home(home)
    args = AppArgs() if config is None else read_app_args(config)
    with (
        opened_pool(target, args.memory.pool, address) as pool,
        console.status("comparing scores") as status,
    ):
        audited = ServingAudit(args, target, pool, AuditSize(users, items, seed))
        report = audited.of_stages() if url is None else audited.of_application(url, api_key)
        status.stop()
    console.print(arms_table(report))
    if not report.arms:
        console.print("[bold red]nothing could be compared[/]; see 'skipped'")
    typer.echo(to_json(report.to_dict()))
    if not report.passed:
        raise typer.Exit(1)


def arms_table(report: AuditReport) -> Table:
    """The arms for people."""
    table = Table()
    for name in ("stage", "arm"):
        table.add_column(name)
    for name in ("version", "users", "pairs", "worst", "allowed"):
        table.add_column(name, justify="right")
    table.add_column("")
    for one in report.arms:
        table.add_row(
            one.arm.stage,
            one.arm.arm,
            str(one.arm.version),
            str(one.users),
            f"{one.pairs:,}",
            f"{one.worst_difference:.2e}",
            f"{one.arm.tolerance:g}",
            "[green]equal[/]" if one.passed else "[bold red]differs[/]",
        )
    return table
