"""Table 3: MARM in one stage at a time, as A/B tests in the simulated world.

    python -m benchmarks.paper.table3 --data world --seeds 3 --out results

For each seed a world writes its log, and two configurations of all three models learn it in one
test-then-train pass: the control, which has no memory (L = 0), and MARM. Then the users live on. A
random half of them is in the treatment, where MARM's model answers at one stage and the control's
at the others: every item is retrieved from, cascading and ranking choose among what is left. What
all users do is learned by both configurations between rounds. Another experiment has MARM at all
stages, and one, where nobody has it, says how the same users would have lived without. The last
line is JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace

from benchmarks.paper.code_version import code_version
from benchmarks.paper.datasets import parse_world
from benchmarks.paper.options import Experiment, trial_options
from benchmarks.paper.plan import Method, parse_method
from benchmarks.paper.report import short
from benchmarks.paper.table3_report import (
    figures_to_dict,
    lifts_to_dict,
    page,
    plot_lifts,
    pooled_lifts,
)
from benchmarks.paper.table3_seed import CONTROL, MARM, SeedPlan, run_seeds
from benchmarks.paper.table3_world import Traffic
from train.config import TrainConfig, three_stages

CONTROL_METHOD = "marm_l0"
_PROGRAM = "benchmarks.paper.table3"
DEFAULT_WORLD = "num_users=300,num_items=2000,num_events=60000"
"""What ``--data world`` is where it says nothing else: smaller than in other programs, as six
models learn the log and five lives go on after it."""

NUM_SLOTS = 1 << 16
"""Rows of a table: a world has few ids, and every experiment copies the tables."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train, live on, compare."""
    parser = _parser()
    options = parser.parse_args(argv)
    _check_data(parser, options)
    marm, traffic = parse_method(options.method), _traffic(options)
    with Experiment("table3", options) as experiment:
        plans = [_plan(experiment, options, marm, traffic, seed) for seed in experiment.seeds]
        results = run_seeds(plans, experiment.scratch, options.jobs)
        adjusted, plain = pooled_lifts(results)
        document = experiment.document(
            {
                **lifts_to_dict(adjusted, plain),
                "on_the_log": figures_to_dict(results),
                "cpu_s": {k: [short(r.cpu_s[k]) for r in results] for k in results[0].cpu_s},
                "methods": {CONTROL: CONTROL_METHOD, MARM: marm.name},
                "traffic": asdict(traffic),
                "plan_of_first_seed": asdict(plans[0]),
            }
        )
        document["code"] = code_version([_PROGRAM])
        plot = experiment.out(".png")
        if plot is not None:
            plot_lifts(adjusted, experiment.dataset.name, plot)
        experiment.finish(document, page(document, adjusted, plain))


def _parser() -> argparse.ArgumentParser:
    parser = trial_options("table3", __doc__)
    traffic = Traffic()
    parser.add_argument("--method", default="marm_e_l2", help="what the treatment has")
    parser.add_argument("--cascading-history", type=int, default=20, help="n of cascading")
    parser.add_argument("--retrieval-history", type=int, default=100, help="n of retrieval")
    parser.add_argument("--rounds", type=int, default=traffic.rounds, help="of living on")
    parser.add_argument("--retrieved", type=int, default=traffic.retrieved, help="items, of all")
    parser.add_argument("--preselected", type=int, default=traffic.preselected, help="of those")
    parser.add_argument("--shown", type=int, default=traffic.shown, help="of those")
    return parser


def _check_data(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Only a world can answer what its users would do."""
    kind, _, settings = options.data.partition(":")
    if kind != "world":
        parser.error(
            f"--data must be world or world:SETTING=VALUE,.. but is {options.data!r}: users of a "
            "recorded log can't be shown other items; the other programs take such logs"
        )
    if options.limit is not None:
        parser.error(
            "--limit cuts a log, and users live on where it ends; use world:num_events="
            f"{options.limit}"
        )
    # What comes later counts.
    options.data = f"world:{DEFAULT_WORLD},{settings}"


def _traffic(options: argparse.Namespace) -> Traffic:
    return Traffic(
        rounds=options.rounds,
        retrieved=options.retrieved,
        preselected=options.preselected,
        shown=options.shown,
    )


def _plan(
    experiment: Experiment,
    options: argparse.Namespace,
    marm: Method,
    traffic: Traffic,
    seed: int,
) -> SeedPlan:
    """A world of its own for every seed, so that seeds have nothing in common but settings."""
    first = parse_world(options.data)

    def trained(method: Method) -> TrainConfig:
        config = experiment.config(method, seed)
        ranking = replace(config.models[0], num_slots=NUM_SLOTS)
        models = three_stages(ranking, options.cascading_history, options.retrieval_history)
        return replace(config, models=models)

    return SeedPlan(
        seed,
        replace(first, seed=first.seed + seed),
        trained(parse_method(CONTROL_METHOD)),
        trained(marm),
        traffic,
        experiment.window,
    )


if __name__ == "__main__":
    main()
