"""``marm memory rebuild``: recompute rows from the log with the published weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from app.cli.memory.pools import DEFAULT_POOL, PoolOption, started_pool
from app.cli.options import DEFAULT_HOME, AddressOption, HomeOption
from app.cli.session import console, progress_bar, to_json
from cache_actors.home import Home
from cache_actors.registry import ModelRegistry
from train.rebuild.request import RebuildRequest
from train.rebuild.run import RebuildProgress, RebuildReport, rebuild_memory
from train.rebuild.weights import load_weights


def rebuild_command(
    home: HomeOption = DEFAULT_HOME,
    variant: Annotated[str, typer.Option(help="Ranking variant whose weights to use.")] = "default",
    version: Annotated[
        int | None, typer.Option(help="Published version; default: the one that serves.")
    ] = None,
    users: Annotated[
        str | None, typer.Option(help="Only these users: ids separated by commas.")
    ] = None,
    users_from: Annotated[
        Path | None, typer.Option("--users-from", help="Only the users in this file, one a line.")
    ] = None,
    limit_users: Annotated[
        int | None, typer.Option("--limit-users", min=1, help="At most so many, the hottest.")
    ] = None,
    missing: Annotated[
        bool, typer.Option("--missing", help="Only rows that are absent or raw.")
    ] = False,
    older_than_steps: Annotated[
        int | None,
        typer.Option("--older-than-steps", min=0, help="Only rows older than the version by this."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also rows that are newer than the version.")
    ] = False,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Newest rows per user; default: all the pool keeps.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, one CPU each.")] = 1,
    pool: PoolOption = DEFAULT_POOL,
    address: AddressOption = None,
) -> None:
    """Recompute rows that are lost, raw or out of date, hot users first; prints counts as JSON.

    Training and serving may go on meanwhile. A rebuild that was cut short goes on where it stopped
    when it is started again.
    """
    request = RebuildRequest(
        variant=variant,
        version=version,
        user_ids=asked_users(users, users_from),
        limit_users=limit_users,
        older_than_steps=bound_steps(missing, older_than_steps),
        replace_newer=everything,
        newest=rows,
        num_workers=workers,
    )
    target = Home(home)
    load_weights(ModelRegistry(target.models), variant, version)  # before anything is started
    with started_pool(target, pool, address) as opened, progress_bar() as bars:
        bar = bars.add_task("rebuilding", total=None, note="counting users")

        def show(progress: RebuildProgress) -> None:
            note = f"{progress.report.rows_written:,} rows written"
            done, total = progress.events_done, progress.events_total
            bars.update(bar, completed=done, total=total, note=note)

        report = rebuild_memory(target, request, opened.pool, show)
    console.print(describe(report))
    typer.echo(to_json(asdict(report)))


def describe(report: RebuildReport) -> str:
    """What a rebuild did, in a sentence."""
    done = report.done
    text = (
        f"{done.rows_written:,} of {done.rows:,} rows rewritten with {report.variant} version "
        f"{report.version} (step {report.step:,}), for {done.users_due:,} of {done.users:,} users"
    )
    if report.users_without_events:
        text += f"; {report.users_without_events:,} users have no events in the log"
    return text


def bound_steps(missing: bool, older_than_steps: int | None) -> int | None:
    """`RebuildRequest.older_than_steps` of the two options that choose it."""
    if missing and older_than_steps is not None:
        raise ValueError("--missing and --older-than-steps exclude each other; give one of them")
    if missing:
        return None
    return 0 if older_than_steps is None else older_than_steps


def asked_users(listed: str | None, file: Path | None) -> tuple[int, ...] | None:
    """The users that were asked for, by id or in a file; None: everybody."""
    if listed is not None and file is not None:
        raise ValueError("--users and --users-from exclude each other; give one of them")
    if listed is not None:
        return _parsed(listed.split(","), "--users must be ids separated by commas")
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the users in {file}: {error}") from error
        return _parsed(lines, f"{file} must hold one user id per line")
    return None


def _parsed(texts: list[str], expected: str) -> tuple[int, ...]:
    ids = []
    for text in texts:
        try:
            number = int(text)
        except ValueError:
            raise ValueError(f"{expected}, got {text!r}") from None
        if not -(2**63) <= number < 2**63:
            raise ValueError(f"{expected} of 64 bits, got {text!r}")
        ids.append(number)
    return tuple(ids)
