"""What Table 3's experiments found: for JSON, as a Markdown page, and as a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.paper.report import markdown_table, short
from benchmarks.paper.statistics import Spread
from benchmarks.paper.table3_lift import (
    METRICS,
    PooledLift,
    adjusted_lift,
    plain_lift,
    pooled_lift,
)
from benchmarks.paper.table3_seed import CONTROL, EXPERIMENTS, MARM, WITHOUT, SeedResult

_PANEL_INCHES = 3.4
_DPI = 120

ARMS = {CONTROL: "control (L=0)", MARM: "MARM"}
PAPER = {"retrieval": 0.456, "cascading": 0.260, "ranking": 1.370}
"""Watch time in the paper's Table 3, in percent."""

Lifts = dict[str, dict[str, PooledLift]]
"""By experiment, then by metric."""


def pooled_lifts(results: Sequence[SeedResult]) -> tuple[Lifts, Lifts]:
    """Adjusted and plain, of all experiments but the one without a treatment."""
    adjusted: Lifts = {}
    plain: Lifts = {}
    for name in EXPERIMENTS:
        if name == WITHOUT:
            continue
        adjusted[name], plain[name] = {}, {}
        for metric in METRICS:
            adjusted[name][metric.name] = pooled_lift(
                [
                    adjusted_lift(metric, one.lives[name], one.lives[WITHOUT], one.treated_U)
                    for one in results
                ]
            )
            plain[name][metric.name] = pooled_lift(
                [plain_lift(metric, one.lives[name], one.treated_U) for one in results]
            )
    return adjusted, plain


def _title(name: str) -> str:
    return {"all": "All three"}.get(name, name.capitalize())


def lifts_to_dict(adjusted: Lifts, plain: Lifts) -> dict[str, Any]:
    """Plain values for JSON."""
    return {
        "experiments": {
            name: {
                "title": _title(name),
                "lift": _lifts(adjusted[name]),
                "plain_lift": _lifts(plain[name]),
                "paper_watch_time_percent": PAPER.get(name),
            }
            for name in adjusted
        }
    }


def _lifts(lifts: Mapping[str, PooledLift]) -> dict[str, Any]:
    return {
        name: {
            "lift": short(one.lift.value),
            "low": short(one.lift.low),
            "high": short(one.lift.high),
            "p_value": short(one.p_value),
            "control": short(one.control),
            "per_seed": [short(value) for value in one.per_seed],
            "error_users": short(one.error_users),
            "error_seeds": short(one.error_seeds),
        }
        for name, one in lifts.items()
    }


def figures_to_dict(results: Sequence[SeedResult]) -> dict[str, dict[str, Any]]:
    """Test-then-train figures of both configurations, over the seeds."""
    found: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        found[arm] = {}
        for name in results[0].figures[arm]:
            spread = Spread.of([one.figures[arm][name] for one in results])
            values = [short(value) for value in spread.values]
            found[arm][name] = {"mean": short(spread.mean), "values": values}
    return found


def page(document: Mapping[str, Any], adjusted: Lifts, plain: Lifts) -> str:
    """All of it as Markdown."""
    settings, traffic = document["settings"], document["traffic"]
    common = settings["common"]
    return (
        "# Table 3: MARM in one stage at a time\n\n"
        f"{settings['data']}, and a world of another seed for each of {settings['seeds']} seeds; "
        f"{settings['num_events']:,} events each, then {traffic['rounds']} rounds of living on: "
        f"all items, {traffic['retrieved']} retrieved, {traffic['preselected']} left by "
        f"cascading, {traffic['shown']} shown. n={common['history_length']}, d={common['dim']}, "
        f"{document['methods'][MARM]} against {document['methods'][CONTROL]}.\n\n"
        "Lifts of the treatment over the control with 95% intervals: users are clusters, seeds "
        "count alike, and where seeds differ by more than their users explain, the interval is "
        "that of the seeds. Adjusted by what the same users did in the same random stream without "
        "the experiment; not adjusted for several comparisons.\n\n"
        f"{_table(adjusted)}\nThe arms as they are, as a production system sees them:\n\n"
        f"{_table(plain)}\nBoth configurations on the log (test then train, mean over seeds):\n\n"
        f"{_log_table(document['on_the_log'])}"
    )


def _table(lifts: Lifts) -> str:
    heads = ["MARM in", *(metric.title for metric in METRICS), "paper: watch time"]
    body = [
        [
            _title(name),
            *(_interval(by_metric[metric.name]) for metric in METRICS),
            f"{PAPER[name]:+.3f}%" if name in PAPER else "",
        ]
        for name, by_metric in lifts.items()
    ]
    return markdown_table(heads, body)


def _interval(found: PooledLift) -> str:
    if math.isnan(found.lift.value):
        return "too few users to tell"
    value, low, high = (100 * part for part in (found.lift.value, found.lift.low, found.lift.high))
    return f"{value:+.2f}% ({low:+.2f} .. {high:+.2f})"


def _log_table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(figures[CONTROL])
    body = [
        [title, *(_rounded(figures[arm][name]["mean"]) for name in names)]
        for arm, title in ARMS.items()
    ]
    return markdown_table(["", *(name.replace("_", " ") for name in names)], body)


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def plot_lifts(lifts: Lifts, title: str, path: Path) -> None:
    """A panel per metric: means with their intervals, and a dot per seed."""
    size = (_PANEL_INCHES * len(METRICS), 0.45 * len(lifts) + 1.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(METRICS), sharey=True, squeeze=False)[0]
    for axis, metric in zip(axes, METRICS, strict=True):
        for place, by_metric in enumerate(lifts.values()):
            found = by_metric[metric.name]
            low, value, high = (
                100 * part for part in (found.lift.low, found.lift.value, found.lift.high)
            )
            seeds = [100 * one for one in found.per_seed]
            axis.plot(seeds, [place + 0.18] * len(seeds), "o", color="#57606a", markersize=3)
            axis.plot([low, high], [place, place], "-", color="#0969da", linewidth=2)
            axis.plot([value], [place], "D", color="#0969da", markersize=6)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(lifts)), [_title(name) for name in lifts])
        axis.set_ylim(len(lifts) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(metric.title, fontsize="medium")
        axis.set_xlabel("lift, %; dots are seeds", fontsize="small")
    figure.suptitle(f"MARM over no memory, {title}")
    figure.savefig(path, dpi=_DPI)
