"""A report as a forest plot. Needs matplotlib: this module is loaded when a plot is asked for."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from app.ab_report.comparison import Comparison, ExperimentReport
from app.ab_report.report import AbReport

_GOOD, _BAD, _UNCLEAR = "#1a7f37", "#c62828", "#57606a"
_ROW_INCHES = 0.32
_WIDTH_INCHES = 8.0


def plot_report(report: AbReport, path: Path) -> None:
    """Write the relative lifts with their intervals; the suffix of ``path`` says the format.

    Raises ValueError for a format that matplotlib does not know.
    """
    shown = [_rows(found) for found in report.experiments]
    heights = [len(rows) + 3 for rows in shown]
    figure = Figure(figsize=(_WIDTH_INCHES, _ROW_INCHES * sum(heights) + 0.6), layout="constrained")
    axes = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, found, rows in zip(axes, report.experiments, shown, strict=True):
        _draw(axis, found, rows, report.confidence)
    figure.savefig(path, dpi=120)


def _rows(found: ExperimentReport) -> list[Comparison]:
    """Comparisons with a relative lift; the others have no place on a common axis."""
    return [row for row in found.comparisons if math.isfinite(row.lift.relative.low)]


def _draw(axis: Axes, found: ExperimentReport, rows: list[Comparison], confidence: float) -> None:
    for place, row in enumerate(rows):
        lift, colour = row.lift.relative, _colour(row)
        axis.plot([100 * lift.low, 100 * lift.high], [place, place], color=colour, linewidth=2)
        marker = "D" if row.guard else "o"
        axis.plot([100 * lift.value], [place], marker=marker, color=colour, markersize=5)
    axis.axvline(0, color="black", linewidth=0.8)
    several = len(found.arms) > 2
    names = [f"{row.metric} ({row.arm})" if several else row.metric for row in rows]
    axis.set_yticks(range(len(rows)), names)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    arms = ", ".join(arm for arm in found.arms if arm != found.control)
    title = f"{found.experiment}: {arms} against {found.control}"
    if found.sample_ratio is not None and found.sample_ratio.mismatch:
        axis.set_title(f"{title}: SAMPLE RATIO MISMATCH", color=_BAD)
    else:
        axis.set_title(title)
    axis.set_xlabel(f"lift in % with {confidence:.0%} intervals; diamonds are guards")


def _colour(row: Comparison) -> str:
    if row.verdict == "unclear":
        return _UNCLEAR
    return _GOOD if (row.verdict == "higher") != row.guard else _BAD
