"""What a benchmark found: figures with their targets, as a table and as one JSON line."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from benchmarks.perf.timing import Ratio

_MEASURED_PACKAGES = ("numpy", "ray", "lmdb", "redis", "hiredis")
_TABLE_WIDTH = 120


@dataclass(frozen=True)
class Target:
    """A bound that a figure is to keep."""

    bound: Literal["at_most", "at_least"]
    value: float

    def holds(self, value: float) -> bool:
        """Whether ``value`` keeps it."""
        return value <= self.value if self.bound == "at_most" else value >= self.value

    def __str__(self) -> str:
        return f"{'<=' if self.bound == 'at_most' else '>='} {self.value:g}"


@dataclass(frozen=True)
class Figure:
    """One number that was asked for. Without a target it is there for comparison."""

    key: str
    what: str
    ratio: Ratio
    target: Target | None = None

    @property
    def holds(self) -> bool:
        """Whether the target is met; true without one."""
        return self.target is None or self.target.holds(self.ratio.value)


@dataclass(frozen=True)
class Measured:
    """What one measure gives: its figures, and the absolute medians behind them by name."""

    figures: tuple[Figure, ...]
    medians: dict[str, float]


def exactly(value: float) -> Ratio:
    """A figure without spread, such as a count of bytes."""
    return Ratio(value, value, value)


def at_most(value: float) -> Target:
    """An upper bound."""
    return Target("at_most", value)


def at_least(value: float) -> Target:
    """A lower bound."""
    return Target("at_least", value)


def print_table(title: str, measured: Sequence[Measured]) -> None:
    """All figures, then all medians."""
    table = Table("figure", "median", "quartiles", "target", "holds", "what", title=title)
    for figure in (figure for part in measured for figure in part.figures):
        ratio = figure.ratio
        table.add_row(
            figure.key,
            f"{ratio.value:.3f}",
            f"{ratio.lower_quartile:.3f} .. {ratio.upper_quartile:.3f}",
            "" if figure.target is None else str(figure.target),
            "" if figure.target is None else ("yes" if figure.holds else "NO"),
            figure.what,
        )
    absolute = Table("median", "value")
    for name, value in (item for part in measured for item in part.medians.items()):
        absolute.add_row(name, f"{value:,.3f}")
    console = Console(width=_TABLE_WIDTH)
    console.print(table)
    console.print(absolute)


def json_line(
    benchmark: str, measured: Sequence[Measured], settings: dict[str, Any], elapsed_s: float
) -> str:
    """Every figure under its key, then their spread and targets, medians and settings."""
    figures = [figure for part in measured for figure in part.figures]
    content: dict[str, Any] = {"benchmark": benchmark}
    content |= {figure.key: _short(figure.ratio.value) for figure in figures}
    content["all_hold"] = all(figure.holds for figure in figures)
    content["figures"] = {figure.key: _details(figure) for figure in figures}
    content["medians"] = {
        name: _short(value) for part in measured for name, value in part.medians.items()
    }
    content["settings"] = settings
    content["machine"] = machine()
    content["elapsed_s"] = round(elapsed_s, 1)
    return json.dumps(content)


def machine() -> dict[str, Any]:
    """What the figures were measured with."""
    return {
        "cpus": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _MEASURED_PACKAGES},
    }


def data_name(data: str) -> str:
    """What a result says of its data: a file's name, but not where it was on the machine."""
    return Path(data).name


def write_result(line: str, output: str | None) -> None:
    """Print the line, and keep it where that was asked for."""
    print(line, flush=True)
    if output is not None:
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(json.loads(line), indent=2) + "\n", encoding="utf-8")


def _details(figure: Figure) -> dict[str, Any]:
    return {
        "what": figure.what,
        "quartiles": [_short(figure.ratio.lower_quartile), _short(figure.ratio.upper_quartile)],
        "target": None if figure.target is None else asdict(figure.target),
        "holds": None if figure.target is None else figure.holds,
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")
