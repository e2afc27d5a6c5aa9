"""Plots of the experiments, drawn with matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.paper.report import MethodRow

_ROW_INCHES = 0.36
_WIDTH_INCHES = 8.0
_TITLE_CHARACTERS = 48
_PANEL_INCHES = 4.2
_DPI = 120


@dataclass(frozen=True)
class Line:
    """One line of a panel: points with their spread."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float]  # empty: none is drawn
    is_curve: bool = False  # drawn without points


@dataclass(frozen=True)
class Panel:
    """Lines over one logarithmic axis."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    base: int = 2


def plot_methods(rows: Sequence[MethodRow], floor_gauc: float, title: str, path: Path) -> None:
    """GAUC of every method: a dot per seed, and the mean; the suffix of ``path`` is the format."""
    figure = Figure(figsize=(_WIDTH_INCHES, _ROW_INCHES * len(rows) + 1.4), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(rows):
        gauc = row.quality["gauc"]
        axis.plot(gauc.values, [place] * len(gauc.values), "o", color="#57606a", markersize=3)
        axis.plot([gauc.mean], [place], "D", color="#0969da", markersize=6)
    axis.axvline(floor_gauc, color="#c62828", linewidth=0.8, label="running item mean")
    titles = [textwrap.fill(row.title, _TITLE_CHARACTERS) for row in rows]
    axis.set_yticks(range(len(rows)), titles, fontsize="small")
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("GAUC; dots are seeds, diamonds their means", loc="right")
    axis.set_title(title)
    axis.legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=_DPI)


def plot_panels(panels: Sequence[Panel], path: Path) -> None:
    """Panels side by side."""
    figure = Figure(figsize=(_PANEL_INCHES * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for line in panel.lines:
            if line.is_curve:
                axis.plot(line.x, line.y, "--", color="black", linewidth=1, label=line.label)
            else:
                error = np.nan_to_num(np.asarray(line.error, np.float64)) if line.error else None
                axis.errorbar(line.x, line.y, error, marker="o", markersize=4, label=line.label)
        axis.set_xscale("log", base=panel.base)
        axis.set_xlabel(panel.x_label)
        axis.set_ylabel(panel.y_label)
        axis.set_title(panel.title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=_DPI)


def plot_matrices(matrices: Mapping[str, NDArray], path: Path) -> None:
    """Square matrices of shares in [0, 1] with their values written in, by title."""
    figure = Figure(figsize=(_PANEL_INCHES * len(matrices), 4.0), layout="constrained")
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=True):
        axis.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
        for row, column in np.ndindex(*matrix.shape):
            colour = "white" if matrix[row, column] > 0.6 else "black"
            axis.text(column, row, f"{matrix[row, column]:.2f}", ha="center", va="center", c=colour)
        axis.set_xticks(range(len(matrix)), [f"layer {layer}" for layer in range(len(matrix))])
        axis.set_yticks(range(len(matrix)), [f"layer {layer}" for layer in range(len(matrix))])
        axis.set_title(title)
    figure.savefig(path, dpi=_DPI)
