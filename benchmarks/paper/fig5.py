"""Fig. 5: GAUC as width, length and depth grow, and against the cache size C = L * n * d.

    python -m benchmarks.paper.fig5 --data world --lengths 100,300,1000 --seeds 3 --out results

(a) d and n at L = 0; (b) L and n at one d (``--dim``); (c) all of (b) with L > 0 against C, with
the power law that fits them. The last line is JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.paper.options import Experiment, program_of, trial_options
from benchmarks.paper.plan import WITH_ERRORS, parse_method
from benchmarks.paper.plots import Line, Panel, plot_panels
from benchmarks.paper.power_law import Fit, PowerLaw, SaturatingPowerLaw, fit_law
from benchmarks.paper.report import (
    difference_to_dict,
    heading,
    interval,
    markdown_table,
    mean_and_std,
    short,
)
from benchmarks.paper.statistics import PairedDifference, Spread, paired_difference, quality
from benchmarks.paper.trial import TrialResult
from marm.config import MEMORY_METHODS
from train.config import TrainConfig

OVER_L0 = "L=0"
OVER_FEWER = "the next fewer layers"
OVER_SHORTER = "the next shorter n"
COMPARED = (OVER_L0, OVER_FEWER, OVER_SHORTER)
"""What a size is compared with, in a table's words."""

CACHED = (*MEMORY_METHODS, WITH_ERRORS)
"""Methods that have a cache to scale."""


@dataclass(frozen=True, order=True)
class Size:
    """One point of the figure."""

    depth: int  # L
    history_length: int  # n
    dim: int  # d

    @property
    def cache_size(self) -> int:
        """C: numbers in a user's cache."""
        return self.depth * self.history_length * self.dim

    @property
    def name(self) -> str:
        """Readable and unique."""
        return f"L={self.depth} n={self.history_length} d={self.dim}"


Gains = dict[Size, dict[str, PairedDifference]]
"""Of every size, by what it is compared with."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the grid and report."""
    parser = trial_options("fig5", __doc__)
    parser.add_argument("--method", choices=CACHED, default="marm", help="of all points")
    parser.add_argument("--dims", type=integers, default=(16, 32, 64, 128), help="d of (a)")
    parser.add_argument("--lengths", type=integers, default=(25, 50, 100, 200), help="n")
    parser.add_argument("--depths", type=integers, default=(0, 1, 2, 4), help="L of (b)")
    options = parser.parse_args(argv)
    with Experiment(program_of("fig5", options.method), options) as experiment:
        width = experiment.common.dim
        wide = [Size(0, n, d) for d in options.dims for n in options.lengths]
        deep = [Size(depth, n, width) for depth in options.depths for n in options.lengths]
        sizes = sorted({*wide, *deep})
        configs = {size.name: config_of(experiment, options.method, size) for size in sizes}
        results = experiment.run_seeds(configs)
        gauc = {size: _gauc(experiment, results[size.name]) for size in sizes}
        fits = fit_cache_sizes({size: gauc[size] for size in deep})
        gains = _gains(experiment, deep, results)
        document = experiment.document(
            {
                "method": options.method,
                "points": [_point(size, gauc[size]) for size in sizes],
                "power_law": {name: fit and fit.to_dict() for name, fit in fits.items()},
                "gains": {
                    size.name: {name: difference_to_dict(found) for name, found in of.items()}
                    for size, of in gains.items()
                },
            }
        )
        page = heading("Fig. 5: scaling", document) + _tables(sizes, gauc, gains, fits)
        plot = experiment.out(".png")
        if plot is not None:
            plot_panels(_panels(wide, deep, gauc, fits), plot)
        experiment.finish(document, page)


def integers(text: str) -> tuple[int, ...]:
    """``"25,50"`` as numbers."""
    return tuple(int(part) for part in text.split(","))


def config_of(experiment: Experiment, method: str, size: Size) -> TrainConfig:
    """A method with a memory, of that size, all else as the experiment has it."""
    common = replace(experiment.common, history_length=size.history_length, dim=size.dim)
    return common.train_config(experiment.dataset, parse_method(f"{method}_l{size.depth}"), 0)


def fit_cache_sizes(gauc: dict[Size, Spread]) -> dict[str, Fit | None]:
    """The laws of GAUC against C, by name; sizes without a cache don't count."""
    cached = [size for size in gauc if size.cache_size > 0]
    sizes = [float(size.cache_size) for size in cached]
    figures = [gauc[size].mean for size in cached]
    laws = {"power_law": PowerLaw(), "saturating": SaturatingPowerLaw()}
    return {name: fit_law(law, sizes, figures) for name, law in laws.items()}


def _gauc(experiment: Experiment, results: Sequence[TrialResult]) -> Spread:
    return quality(experiment.predictions(results))["gauc"]


def compared_sizes(deep: Sequence[Size]) -> dict[Size, dict[str, Size]]:
    """What every size is compared with, where it is there: no memory at the same length, the next
    fewer layers, and the next shorter history."""
    found: dict[Size, dict[str, Size]] = {}
    for size in deep:
        depths = [one.depth for one in deep if one.history_length == size.history_length]
        lengths = [one.history_length for one in deep if one.depth == size.depth]
        fewer = [depth for depth in depths if depth < size.depth]
        shorter = [length for length in lengths if length < size.history_length]
        others = {}
        if 0 in fewer:
            others[OVER_L0] = replace(size, depth=0)
        if fewer:
            others[OVER_FEWER] = replace(size, depth=max(fewer))
        if shorter:
            others[OVER_SHORTER] = replace(size, history_length=max(shorter))
        found[size] = others
    return found


def _gains(
    experiment: Experiment, deep: Sequence[Size], results: dict[str, list[TrialResult]]
) -> Gains:
    """GAUC of every size less that of those it is compared with, paired user by user."""
    of = {size: experiment.predictions(results[size.name]) for size in deep}
    return {
        size: {name: paired_difference(of[size], of[other]) for name, other in others.items()}
        for size, others in compared_sizes(deep).items()
    }


def _point(size: Size, gauc: Spread) -> dict[str, Any]:
    return {
        "depth": size.depth,
        "history_length": size.history_length,
        "dim": size.dim,
        "cache_size": size.cache_size,
        "gauc": short(gauc.mean),
        "std": short(gauc.std),
    }


def _tables(
    sizes: Sequence[Size],
    gauc: dict[Size, Spread],
    gains: Gains,
    fits: dict[str, Fit | None],
) -> str:
    body = [
        [
            str(size.depth),
            str(size.history_length),
            str(size.dim),
            f"{size.cache_size:,}",
            mean_and_std(gauc[size]),
            *(interval(gains.get(size, {}).get(name)) for name in COMPARED),
        ]
        for size in sizes
    ]
    laws = "\n".join(
        f"- {name}: {fit if fit is not None else 'not determined by these points'}"
        for name, fit in fits.items()
    )
    heads = ["L", "n", "d", "C", "GAUC", *(f"less {name}" for name in COMPARED)]
    return markdown_table(heads, body) + f"\nGAUC against C:\n\n{laws}\n"


def _panels(
    wide: Sequence[Size],
    deep: Sequence[Size],
    gauc: dict[Size, Spread],
    fits: dict[str, Fit | None],
) -> list[Panel]:
    lengths = sorted({size.history_length for size in deep})
    cached = [size for size in deep if size.depth > 0]
    by_width = [
        _line(
            f"n={n}",
            [s for s in wide if s.history_length == n],
            [s.dim for s in wide if s.history_length == n],
            gauc,
        )
        for n in lengths
    ]
    by_depth = [
        _line(f"L={depth}", of, [size.history_length for size in of], gauc)
        for depth in sorted({size.depth for size in deep})
        if (of := [size for size in deep if size.depth == depth])
    ]
    by_cache = [
        _line(f"L={depth}", of, [size.cache_size for size in of], gauc)
        for depth in sorted({size.depth for size in cached})
        if (of := [size for size in cached if size.depth == depth])
    ]
    fit = fits["power_law"]
    if fit is not None:
        ends = [size.cache_size for size in cached]
        grid = np.geomspace(min(ends), max(ends), 50)
        by_cache.append(Line(fit.law.formula, grid.tolist(), fit.at(grid).tolist(), (), True))
    return [
        Panel("(a) width, L=0", "d", "GAUC", by_width),
        Panel("(b) depth and length", "n", "GAUC", by_depth),
        Panel("(c) cache size", "C = L n d", "GAUC", by_cache),
    ]


def _line(label: str, sizes: Sequence[Size], x: Sequence[int], gauc: dict[Size, Spread]) -> Line:
    return Line(label, x, [gauc[size].mean for size in sizes], [gauc[size].std for size in sizes])


if __name__ == "__main__":
    main()
