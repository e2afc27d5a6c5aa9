"""A report as tables for a terminal."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from app.ab_report.comparison import Comparison, ExperimentReport
from app.ab_report.lift import Estimate
from app.ab_report.report import AbReport
from app.ab_report.settings import HOUR_MS

_GOOD, _BAD = "green", "red"
_NOTE = (
    "Lift and interval are relative to the control where its mean is clearly above 0, else "
    "absolute (abs).\np is Holm's over all metrics and arms of the experiment; guards, below the "
    "line, keep their own.\nCUPED is the share of variance that earlier behaviour removed. The "
    "smallest lift found with 80% power is 'detectable'."
)


def print_report(report: AbReport, console: Console) -> None:
    """What was counted, then a table per experiment with its warnings."""
    console.print(
        f"{report.answers:,} answers from {_when(report.first_ms)} to {_when(report.last_ms)} UTC; "
        f"{report.attributed_events:,} events within {report.window_ms / HOUR_MS:g} h of an item "
        f"shown, {report.other_events:,} others",
        highlight=False,
    )
    console.print(
        f"left out: {report.overridden_answers:,} overridden answers; "
        f"{report.holdout_answers:,} of held-out users unless compared; "
        f"{report.open_answers:,} answers may still get feedback",
        highlight=False,
    )
    for found in report.experiments:
        _print_experiment(found, report.confidence, console)
    console.print(_NOTE, style="dim", highlight=False)


def _print_experiment(found: ExperimentReport, confidence: float, console: Console) -> None:
    console.print()
    for warning in found.warnings:
        line = f"[bold red]warning:[/] {escape(warning)}"
        console.print(line, highlight=False, soft_wrap=True)
    table = Table(title=f"{found.experiment} ({found.stage}), control: {found.control}")
    table.add_column("metric", no_wrap=True)
    for name in ("arm", "verdict"):
        table.add_column(name)
    for name in ("control", "arm mean", "lift", f"{confidence:.0%} interval", "p", "CUPED"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("detectable", justify="right")
    rows = found.comparisons
    for index, row in enumerate(rows):
        last_metric = not row.guard and index + 1 < len(rows) and rows[index + 1].guard
        table.add_row(*_cells(row), end_section=last_metric)
    console.print(table)
    sizes = "; ".join(
        f"{arm}: {size.users:,} users, {size.requests:,} requests, {size.items:,} items"
        for arm, size in found.arms.items()
    )
    console.print(sizes, highlight=False, soft_wrap=True, markup=False)
    ratio = found.sample_ratio
    checked = "not checked" if ratio is None else f"p = {ratio.p_value:.3g}"
    console.print(
        f"sample ratio: {checked}; users in two arms (left out): {found.crossed_users:,}; "
        f"users with history: {found.users_with_history:,}",
        highlight=False,
    )


def _cells(row: Comparison) -> tuple[str, ...]:
    lift = row.lift
    is_relative = math.isfinite(lift.relative.value)
    shown = lift.relative if is_relative else lift.absolute
    p_value = lift.p_value if row.holm_p_value is None else row.holm_p_value
    detectable = row.minimum_detectable_relative if is_relative else row.minimum_detectable
    return (
        row.metric,
        escape(row.arm),
        _verdict(row),
        f"{lift.control:.4g}",
        f"{lift.arm:.4g}",
        _amount(shown.value, is_relative),
        _interval(shown, is_relative),
        "?" if math.isnan(p_value) else f"{p_value:.2g}",
        "" if row.cuped is None else f"{round(row.variance_reduction, 2) + 0.0:.0%}",
        _amount(detectable, is_relative).lstrip("+"),
    )


def _verdict(row: Comparison) -> str:
    if row.verdict == "unclear":
        return row.verdict
    # More of a metric is better, and more of a guard is worse.
    style = _GOOD if (row.verdict == "higher") != row.guard else _BAD
    return f"[{style}]{row.verdict}[/]"


def _amount(value: float, is_relative: bool) -> str:
    if math.isnan(value):
        return "?"
    return f"{value:+.2%}" if is_relative else f"{value:+.3g} abs"


def _interval(estimate: Estimate, is_relative: bool) -> str:
    if math.isnan(estimate.low):
        return "?"
    if is_relative:
        return f"{estimate.low:+.2%} .. {estimate.high:+.2%}"
    return f"{estimate.low:+.3g} .. {estimate.high:+.3g} abs"


def _when(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1_000, UTC).strftime("%Y-%m-%d %H:%M")
