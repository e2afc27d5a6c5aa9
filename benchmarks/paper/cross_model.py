"""Cross-model use (Section 2.3): is ranking's memory as good for the other stages as their own?

    python -m benchmarks.paper.cross_model --data ratings.parquet --depth 2 --seeds 3 --out results

Cascading and retrieval are trained in one pass each way, all else alike:

- ``shared``: beside ranking, which writes the memory; they read its rows.
- ``own``: alone, with a memory that they write themselves: cascading by its own attention,
  retrieval by the attention of its user query. Only ranking knows prediction errors, so these are
  outputs of attention with ``--method marm_e`` too.
- ``none``: alone, at depth 0, with raw rows only.

Cascading is measured by GAUC and by its agreement with the ranking model of the same seed
(`train.agreement`), retrieval by recall and NDCG at k (`train.retrieval_metrics`). Seven models are
trained with every seed, so by default on the first 300,000 events: about five minutes of one core.
A larger ``--limit`` than the log takes all of it. The last line is JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.paper.options import (
    Experiment,
    ask_for_memory,
    common_options,
    method_with_memory,
    program_of,
    seeded,
)
from benchmarks.paper.plots import Line, Panel, plot_panels
from benchmarks.paper.report import (
    difference_to_dict,
    heading,
    interval,
    markdown_table,
    mean_and_std,
    short,
)
from benchmarks.paper.stage_figures import AT_K, Measured, measure_cascading, measure_retrieval
from benchmarks.paper.stage_runs import StageRun, run_stages
from marm.config import ModelConfig
from train.config import TrainConfig, three_stages
from train.retrieval_metrics import CUTOFFS


def main(argv: Sequence[str] | None = None) -> None:
    """Train with every memory, and report."""
    parser = common_options("cross_model", __doc__)
    ask_for_memory(parser)
    parser.add_argument("--cascading-history", type=int, default=20, help="n of cascading")
    parser.add_argument("--retrieval-history", type=int, default=50, help="n of retrieval")
    parser.set_defaults(limit=300_000)
    options = parser.parse_args(argv)
    method = method_with_memory(parser, options)
    with Experiment(program_of("cross_model", options.method), options) as experiment:
        ranking = experiment.config(method)
        lengths = (options.cascading_history, options.retrieval_history)
        configs = configurations(ranking, *lengths)
        runs = [_runs_of_seed(experiment, configs, seed) for seed in experiment.seeds]
        cascading, retrieval = measure_cascading(runs), measure_retrieval(runs)
        document = experiment.document(
            {
                "method": method.name,
                "depth": options.depth,
                "history": dict(zip(("cascading", "retrieval"), lengths, strict=True)),
                "cascading": _to_dict(cascading),
                "retrieval": _to_dict(retrieval),
                "events_per_s": {
                    name: short(float(np.mean([one[name].cost.events_per_s for one in runs])))
                    for name in configs
                },
            }
        )
        page = heading("Cross-model use of one memory", document) + _page(cascading, retrieval)
        plot = experiment.out(".png")
        if plot is not None:
            plot_panels(_panels(retrieval), plot)
        experiment.finish(document, page)


def configurations(
    ranking: TrainConfig, cascading_history: int, retrieval_history: int
) -> dict[str, TrainConfig]:
    """The passes: the models of ``shared``, ``own`` (one pass per stage) and ``none``."""
    models = three_stages(ranking.models[0], cascading_history, retrieval_history)
    _, cascading, retrieval = models
    return {
        "shared": replace(ranking, models=models),
        "own cascading": replace(ranking, models=(_with_family(cascading),), writer="cascading"),
        "own retrieval": replace(ranking, models=(_with_family(retrieval),), writer="retrieval"),
        "none": replace(ranking, models=(_flat(cascading), _flat(retrieval)), writer="cascading"),
    }


def _with_family(model: ModelConfig) -> ModelConfig:
    namespace = replace(model.namespace, family=model.stage)
    return replace(model, error_layers=0, namespace=namespace)


def _flat(model: ModelConfig) -> ModelConfig:
    namespace = replace(model.namespace, family="raw", depth=0)
    return replace(model, namespace=namespace, depth=0, error_layers=0)


def _runs_of_seed(
    experiment: Experiment, configs: dict[str, TrainConfig], seed: int
) -> dict[str, StageRun]:
    runs = {}
    for name, config in configs.items():
        run = run_stages(experiment.dataset, seeded(config, seed), experiment.window)
        print(
            f"{name}, seed {seed}: {run.cost.seconds:,.0f} s, {run.cost.events_per_s:,.0f} "
            f"events/s, {run.cost.cpu_s:,.0f} CPU s",
            flush=True,
        )
        runs[name] = run
    return runs


def _to_dict(found: Measured) -> dict[str, Any]:
    return {
        "figures": {
            memory: {
                name: {"mean": short(spread.mean), "std": short(spread.std)}
                for name, spread in of.items()
            }
            for memory, of in found.figures.items()
        },
        "differences": {
            pair: {name: difference_to_dict(one) for name, one in of.items()}
            for pair, of in found.differences.items()
        },
    }


def _page(cascading: Measured, retrieval: Measured) -> str:
    note = (
        "shared: ranking's memory. own: a memory that the stage writes itself. none: depth 0. "
        "Agreement is with the ranking model of the same seed.\n\n"
    )
    return note + "\n".join(
        f"## {title}\n\n{_figures(found)}\n{_differences(found)}"
        for title, found in (("Cascading", cascading), ("Retrieval", retrieval))
    )


def _figures(found: Measured) -> str:
    names = list(next(iter(found.figures.values())))
    body = [
        [memory, *(mean_and_std(of[name]) for name in names)]
        for memory, of in found.figures.items()
    ]
    return markdown_table(["memory", *names], body)


def _differences(found: Measured) -> str:
    names = list(next(iter(found.differences.values())))
    body = [
        [pair, *(interval(of[name]) for name in names)] for pair, of in found.differences.items()
    ]
    return markdown_table(["paired difference", *names], body)


def _panels(retrieval: Measured) -> list[Panel]:
    return [
        Panel(
            f"retrieval: {metric}@k",
            "k",
            metric,
            [
                Line(
                    memory,
                    CUTOFFS,
                    [of[f"{metric}@{k}"].mean for k in CUTOFFS],
                    [of[f"{metric}@{k}"].std for k in CUTOFFS],
                )
                for memory, of in retrieval.figures.items()
            ],
        )
        for metric in AT_K
    ]


if __name__ == "__main__":
    main()
