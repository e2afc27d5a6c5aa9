"""``marm memory audit``: how far the stored rows are from what the published weights compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from rich.table import Table

from app.cli.memory.pools import DEFAULT_POOL, PoolOption, opened_pool
from app.cli.options import DEFAULT_HOME, AddressOption, HomeOption
from app.cli.session import console, to_json
from cache_actors.home import Home
from cache_actors.registry import ModelRegistry
from train.rebuild.audit import AuditReport, audit_memory
from train.rebuild.compare import AgeClass, LayerErrors
from train.rebuild.request import AuditRequest
from train.rebuild.weights import load_weights

_SECONDS = {60: "1 min", 600: "10 min", 3_600: "1 h", 21_600: "6 h", 86_400: "1 d", 604_800: "7 d"}


def audit_command(
    users: Annotated[int, typer.Option(min=1, help="Users to sample.")] = 100,
    home: HomeOption = DEFAULT_HOME,
    variant: Annotated[str, typer.Option(help="Ranking variant whose weights to use.")] = "default",
    version: Annotated[
        int | None, typer.Option(help="Published version; default: the one that serves.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample.")] = 0,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Newest rows per user; default: all the pool keeps.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, one CPU each.")] = 1,
    pool: PoolOption = DEFAULT_POOL,
    address: AddressOption = None,
) -> None:
    """Recompute the rows of some users, write nothing, and show how far the stored ones are off.

    A table for people, and one JSON object.
    """
    request = AuditRequest(
        variant=variant,
        version=version,
        num_users=users,
        seed=seed,
        newest=rows,
        num_workers=workers,
    )
    target = Home(home)
    load_weights(ModelRegistry(target.models), variant, version)  # before anything is started
    with opened_pool(target, pool, address) as opened, console.status("recomputing rows"):
        report = audit_memory(target, request, opened.pool)
    for table in tables(report):
        console.print(table)
    console.print(describe(report))
    typer.echo(to_json(report.to_dict()))


def tables(report: AuditReport) -> list[Table]:
    """Errors by layer and age: one table for age in steps, one for age in seconds."""
    steps = _table("written this many steps before", report, report.by_steps, _steps_label)
    seconds = _table("written this long ago", report, report.by_seconds, _seconds_label)
    return [steps, seconds]


def describe(report: AuditReport) -> str:
    """The sample and what of it could not be compared, in a sentence."""
    counts = report.counts
    rows = max(1, counts.rows)
    return (
        f"{counts.users:,} users, {counts.rows:,} rows against {report.variant} version "
        f"{report.version} (step {report.step:,}): {counts.missing_rows / rows:.2%} missing, "
        f"{counts.raw_rows / rows:.2%} raw; {counts.users_without_rows:,} users without any row"
    )


def _table(
    title: str,
    report: AuditReport,
    ages: tuple[AgeClass, ...],
    label: Callable[[AgeClass], str],
) -> Table:
    table = Table(title=f"stored rows against fresh ones, {title}")
    table.add_column("age")
    for name in ("layer", "rows", "error mean", "p50", "p95", "cosine mean", "p05"):
        table.add_column(name, justify="right")
    for age in ages:
        _add_rows(table, label(age), age.rows, age.layers)
    _add_rows(table, "all", sum(age.rows for age in ages), report.layers)
    return table


def _add_rows(table: Table, age: str, rows: int, layers: tuple[LayerErrors, ...]) -> None:
    for layer in layers:
        table.add_row(
            age,
            str(layer.layer),
            f"{rows:,}",
            f"{layer.error_mean:.4f}",
            f"{layer.error_p50:.4f}",
            f"{layer.error_p95:.4f}",
            f"{layer.cosine_mean:.4f}",
            f"{layer.cosine_p05:.4f}",
        )


def _steps_label(age: AgeClass) -> str:
    if age.at_least is None:
        return "newer than the version"
    if age.below is None:
        return f"{age.at_least:,} or more"
    last = age.below - 1
    return f"{age.at_least:,}" if last == age.at_least else f"{age.at_least:,} to {last:,}"


def _seconds_label(age: AgeClass) -> str:
    if age.below is None:
        return f"{_SECONDS[age.at_least or 0]} or more"
    if not age.at_least:
        return f"below {_SECONDS[age.below]}"
    return f"{_SECONDS[age.at_least]} to {_SECONDS[age.below]}"
