"""``marm ab``: which arm of an experiment is better."""

from __future__ import annotations

import importlib
import json
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from app.ab_report.bootstrap import UserBootstrap
from app.ab_report.configured import (
    configured_controls,
    configured_weights,
    parse_controls,
    parse_weights,
    read_routing,
)
from app.ab_report.document import to_document
from app.ab_report.lift import DeltaMethod, LiftMethod
from app.ab_report.report import AbReport, build_report
from app.ab_report.settings import DAY_MS, HOUR_MS, ReportSettings
from app.ab_report.table import print_report
from app.cli.options import DEFAULT_HOME, HomeOption
from app.cli.session import console
from cache_actors.home import Home

ab_app = typer.Typer(help="A/B experiments.", no_args_is_help=True)

_MIN_TABLE_WIDTH = 132


class IntervalMethod(StrEnum):
    """Where intervals come from."""

    delta = "delta"
    bootstrap = "bootstrap"


@ab_app.callback()
def ab() -> None:
    """A/B experiments."""


@ab_app.command()
def report(
    home: HomeOption = DEFAULT_HOME,
    experiment: Annotated[
        list[str] | None,
        typer.Option("--experiment", help="Key of an experiment; default: all. Repeatable."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="Serve config that knows the control arms and weights."),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option("--control", help="ARM or EXPERIMENT=ARM; over --config. Repeatable."),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option("--weights", help="EXPERIMENT:ARM=WEIGHT,...; over --config. Repeatable."),
    ] = None,
    since: Annotated[
        str | None, typer.Option("--since", help="First exposure: date or time, UTC by default.")
    ] = None,
    until: Annotated[
        str | None, typer.Option("--until", help="Exposures before this date or time.")
    ] = None,
    window_hours: Annotated[
        float, typer.Option(help="How long after an exposure feedback belongs to it.")
    ] = 24.0,
    history_days: Annotated[
        float, typer.Option(help="How far before the experiment CUPED looks; 0: no CUPED.")
    ] = 28.0,
    metrics: Annotated[
        str | None, typer.Option(help="Comma-separated metrics; default: all with feedback.")
    ] = None,
    interval: Annotated[
        IntervalMethod, typer.Option(help="Delta method, or bootstrap over users.")
    ] = IntervalMethod.delta,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap.")] = 2_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    with_holdout: Annotated[
        bool, typer.Option("--with-holdout", help="Compare held-out users as if an arm.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report as JSON.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Write a forest plot (.png, .svg, .pdf).")
    ] = None,
) -> None:
    """Join exposures with feedback and compare the arms of each experiment with its control."""
    controls, known_weights = parse_controls(control or []), parse_weights(weights or [])
    if config is not None:
        routing = read_routing(config)
        controls = configured_controls(routing) | controls
        known_weights = configured_weights(routing) | known_weights
    settings = ReportSettings(
        method=lift_method(interval, confidence, resamples, seed),
        window_ms=round(window_hours * HOUR_MS),
        history_ms=round(history_days * DAY_MS),
        metrics=None if metrics is None else tuple(name.strip() for name in metrics.split(",")),
        controls=controls,
        weights=known_weights,
        with_holdout=with_holdout,
    )
    _check_targets(json_file, plot_file)
    with console.status("reading exposures and feedback"):
        found = build_report(
            Home(home),
            settings,
            since_ms=parse_time_ms("--since", since),
            until_ms=parse_time_ms("--until", until),
            experiments=experiment or [],
        )
    out = Console()
    out.width = max(out.width, _MIN_TABLE_WIDTH)  # a pipe has no width of its own
    print_report(found, out)
    if json_file is not None:
        json_file.write_text(json.dumps(to_document(found), indent=2) + "\n", encoding="utf-8")
    if plot_file is not None:
        plot(found, plot_file)
    for warning in mismatches(found):
        line = f"[bold white on red]{escape(warning)}[/]"
        console.print(line, highlight=False, soft_wrap=True)


def lift_method(
    interval: IntervalMethod, confidence: float, resamples: int = 2_000, seed: int = 0
) -> LiftMethod:
    """The method that the options ask for."""
    if interval is IntervalMethod.bootstrap:
        return UserBootstrap(confidence, resamples, seed)
    return DeltaMethod(confidence)


def parse_time_ms(option: str, text: str | None) -> int | None:
    """Milliseconds since 1970 of a date or time in ISO form; UTC unless it says otherwise."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(
            f"{option} must be a date or time such as 2026-01-31 or 2026-01-31T18:00, got {text!r}"
        ) from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1_000)


def plot(found: AbReport, path: Path) -> None:
    """Write the forest plot; raises ValueError when matplotlib is not installed."""
    try:
        # By name, as matplotlib is an extra that the other commands should neither need nor load.
        module = importlib.import_module("app.ab_report.plot")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--plot needs {error.name}; install it with: pip install 'marm[plot]'"
        ) from error
    module.plot_report(found, path)


def mismatches(found: AbReport) -> list[str]:
    """What must not be overlooked: said again as the last lines."""
    return [
        f"{part.experiment}: users did not come in the configured ratio; its lifts are not to be "
        "trusted"
        for part in found.experiments
        if part.sample_ratio is not None and part.sample_ratio.mismatch
    ]


def _check_targets(*paths: Path | None) -> None:
    """Refuse what can't be written before the work is done."""
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"there is no directory {path.parent} to write {path.name} into")
