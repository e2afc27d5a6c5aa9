"""Drift: how far stored rows are from fresh ones, and what an old memory costs.

    python -m benchmarks.paper.drift --data ratings.parquet --depth 2 --seeds 3 --out results

MARM, plain or with errors (`--method marm_e`), is trained in one pass whose memory keeps all rows.
Then a sample of rows of every age is compared, layer by layer, with what the final weights compute
(`benchmarks.paper.row_drift` says what "fresh" means). During the window, the model of every step
also predicts with memories whose newest rows have no vectors yet (`benchmarks.paper.memory_lag`):
GAUC against the age of the memory, paired user by user. The last line is JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.paper.fig5 import integers
from benchmarks.paper.memory_lag import NO_VECTORS, LaggingMemory
from benchmarks.paper.options import (
    Experiment,
    ask_for_memory,
    common_options,
    method_with_memory,
    program_of,
    seeded,
)
from benchmarks.paper.plots import Line, Panel, plot_panels
from benchmarks.paper.report import difference_to_dict, heading, interval, markdown_table, short
from benchmarks.paper.row_drift import DEFINITIONS, AgeDrift, measure_drift
from benchmarks.paper.statistics import (
    PairedDifference,
    Spread,
    paired_difference,
    quality,
    user_aucs,
)
from benchmarks.paper.trial import Cost, Predictions
from benchmarks.paper.watched_pass import first_of, predictions_at, run_watched
from marm.memory_arrays import ArrayMemory
from train.config import TrainConfig

LIVE = "live"
"""The name of the memory of the pass itself, which lacks nothing."""

LAGS = (1_024, 4_096, 16_384, 65_536, 262_144)

_TITLES = {"one_step": "one step fresh", "rebuilt": "rebuilt"}


@dataclass(frozen=True)
class SeedDrift:
    """What one trained model showed."""

    ages: tuple[AgeDrift, ...]
    predictions: dict[str, Predictions]  # by memory: `LIVE`, lags, `NO_VECTORS`
    cost: Cost  # of the pass, with all that was asked meanwhile


@dataclass(frozen=True)
class MemoryAge:
    """GAUC with one memory over all seeds."""

    gauc: Spread
    less_live: PairedDifference | None  # None for `LIVE` itself


def main(argv: Sequence[str] | None = None) -> None:
    """Train, compare, report."""
    parser = common_options("drift", __doc__)
    ask_for_memory(parser)
    parser.add_argument("--lags", type=integers, default=LAGS, help="ages of memory, in events")
    parser.add_argument("--rows", type=int, default=500, help="rows compared in a class of age")
    options = parser.parse_args(argv)
    method = method_with_memory(parser, options)
    with Experiment(program_of("drift", options.method), options) as experiment:
        config = experiment.config(method)
        found = [
            drift_of_seed(experiment, seeded(config, seed), options.lags, options.rows)
            for seed in experiment.seeds
        ]
        ages = gauc_by_memory([one.predictions for one in found])
        document = experiment.document(
            {
                "method": method.name,
                "depth": options.depth,
                "drift": mean_drift([one.ages for one in found]),
                "drift_by_seed": [[asdict(age) for age in one.ages] for one in found],
                "gauc_by_memory_age": {name: _age_to_dict(age) for name, age in ages.items()},
                "events_per_s": [short(one.cost.events_per_s) for one in found],
                "events_per_cpu_s": [short(one.cost.events_per_cpu_s) for one in found],
            }
        )
        page = heading("Drift of stored rows", document) + _page(document["drift"], ages)
        plot = experiment.out(".png")
        if plot is not None:
            plot_panels(_panels(document["drift"], ages), plot)
        experiment.finish(document, page)


def drift_of_seed(
    experiment: Experiment, config: TrainConfig, lags: Sequence[int], rows_per_age: int
) -> SeedDrift:
    """One pass in this process, and everything that is asked of it."""
    dataset, memory = experiment.dataset, ArrayMemory(config.namespace)
    lagging = LaggingMemory(memory, dataset.events.timestamp_ms, lags)
    since = first_of(dataset, experiment.window)
    done = run_watched(dataset, config, memory, since, lagging.watch)
    kept = np.flatnonzero(dataset.window(experiment.window))
    predictions = {
        LIVE: predictions_at(dataset, kept, done.score_N[kept]),
        **lagging.scores.predictions(dataset, experiment.window),
    }
    ages = measure_drift(done, dataset, rows_per_age, config.seed)
    gauc = user_aucs(predictions[LIVE]).gauc
    print(
        f"seed {config.seed}: GAUC {gauc:.4f}, {done.cost.seconds:,.0f} s, "
        f"{done.cost.events_per_s:,.0f} events/s, {done.cost.cpu_s:,.0f} CPU s; "
        f"{sum(age.rows for age in ages):,} rows compared",
        flush=True,
    )
    return SeedDrift(ages, predictions, done.cost)


def gauc_by_memory(seeds: Sequence[dict[str, Predictions]]) -> dict[str, MemoryAge]:
    """GAUC with every memory, and what it loses to the live one."""
    live = [found[LIVE] for found in seeds]
    ages = {}
    for name in seeds[0]:
        own = [found[name] for found in seeds]
        less = None if name == LIVE else paired_difference(own, live)
        ages[name] = MemoryAge(quality(own)["gauc"], less)
    return ages


def mean_drift(seeds: Sequence[Sequence[AgeDrift]]) -> list[dict[str, Any]]:
    """Every class of age and layer: means over the seeds, each a mean over its rows."""
    found = []
    for classes in zip(*seeds, strict=True):
        first = classes[0]
        layers = [
            {
                "layer": layer + 1,
                **{
                    name: {
                        "cosine_distance": short(
                            1 - _mean(one.layers[name][layer].cosine_mean for one in classes)
                        ),
                        "relative_l2": short(
                            _mean(one.layers[name][layer].error_mean for one in classes)
                        ),
                    }
                    for name in DEFINITIONS
                },
            }
            for layer in range(len(first.layers[DEFINITIONS[0]]))
        ]
        rows = sum(one.rows for one in classes)
        found.append(
            {"at_least": first.at_least, "below": first.below, "rows": rows, "layers": layers}
        )
    return found


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _age_to_dict(age: MemoryAge) -> dict[str, Any]:
    return {
        "gauc": short(age.gauc.mean),
        "std": short(age.gauc.std),
        "values": [short(value) for value in age.gauc.values],
        "less_live": None if age.less_live is None else difference_to_dict(age.less_live),
    }


def _page(drift: list[dict[str, Any]], ages: dict[str, MemoryAge]) -> str:
    heads = ["age in events", "rows", "layer"]
    heads += [f"{_TITLES[name]}: {what}" for name in DEFINITIONS for what in ("cosine", "L2")]
    body = [
        [
            f"{one['at_least']:,} to {one['below']:,}",
            f"{one['rows']:,}",
            f"{layer['layer']}",
            *(
                f"{layer[name][figure]:.4f}"
                for name in DEFINITIONS
                for figure in ("cosine_distance", "relative_l2")
            ),
        ]
        for one in drift
        for layer in one["layers"]
    ]
    memories = [
        [_memory_title(name), f"{age.gauc.mean:.4f}", interval(age.less_live)]
        for name, age in ages.items()
    ]
    return (
        "Distance of stored rows to those of the final weights (1 - cosine, and relative to the "
        "fresh row's length). One step fresh: from the stored vectors of the rows before. Rebuilt: "
        "those computed again too.\n\n"
        + markdown_table(heads, body)
        + "\nGAUC with a memory whose newest rows have no vectors yet:\n\n"
        + markdown_table(["vectors are behind by", "GAUC", "less live"], memories)
    )


def _memory_title(name: str) -> str:
    if name == LIVE:
        return "nothing (live)"
    return "everything (no vectors)" if name == NO_VECTORS else f"{int(name):,} events"


def _panels(drift: list[dict[str, Any]], ages: dict[str, MemoryAge]) -> list[Panel]:
    x = [(max(1, one["at_least"]) * one["below"]) ** 0.5 for one in drift]
    layers = range(len(drift[0]["layers"]))
    lines = [
        Line(
            f"layer {layer + 1}, {_TITLES[name]}",
            x,
            [one["layers"][layer][name]["cosine_distance"] for one in drift],
            (),
        )
        for name in DEFINITIONS
        for layer in layers
    ]
    lags = [name for name in ages if name not in (LIVE, NO_VECTORS)]
    behind = [int(name) for name in lags]
    curve = [ages[name].gauc for name in lags]
    gauc = [Line("lagging", behind, [one.mean for one in curve], [one.std for one in curve])]
    for name in (LIVE, NO_VECTORS):
        level = ages[name].gauc.mean
        gauc.append(Line(_memory_title(name), behind, [level] * len(behind), ()))
    return [
        Panel("distance to fresh rows", "age in events", "1 - cosine", lines, 4),
        Panel("GAUC against age", "vectors are behind by events", "GAUC", gauc, 4),
    ]


if __name__ == "__main__":
    main()
