"""RQ4: what MARM costs to train per event, against HSTU* and a single target attention.

    python -m benchmarks.paper.rq4_cost --data world --depth 4 --out results

All methods train on the same last events of a log, in turn, with the earlier ones as their
histories: at every length of ``--lengths``, of which the last is where ratios are taken. MACs are
counted while it runs (matrix products of the whole model, forward and backward), beside what the
formulas of `marm.interest.costs` say of the method alone, forward. Every seed has weights of its
own; figures are medians over seeds. A user's life is what his first so many events take, in batches
as crowded with him as those that were timed, with costs between two lengths on a line. Use a log
with histories as long as the longest length. The last line is JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np

from benchmarks.paper.cost_streams import CostPoint, Slices, measure_costs
from benchmarks.paper.fig5 import integers
from benchmarks.paper.options import Experiment, common_options
from benchmarks.paper.plan import WITH_ERRORS, parse_method
from benchmarks.paper.plots import Line, Panel, plot_panels
from benchmarks.paper.report import heading, markdown_table, short
from marm.config import MEMORY_METHODS
from marm.interest.costs import CostShape, macs_per_event

Costs = dict[str, dict[int, CostPoint]]  # by method, by history length


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = common_options("rq4_cost", __doc__)
    parser.set_defaults(dim=64, batch_size=32)
    parser.add_argument("--depth", type=int, default=4, help="L of MARM, and blocks of HSTU*")
    parser.add_argument("--lengths", type=integers, default=(125, 250, 500, 1000), help="n")
    parser.add_argument("--slice-events", type=int, default=512, help="events timed at a time")
    parser.add_argument("--rounds", type=int, default=3, help="slices timed of every method")
    options = parser.parse_args(argv)
    options.history = max(options.lengths)  # of what is reported as the settings
    marm, hstu, flat = f"marm_l{options.depth}", f"hstu_l{options.depth}", "marm_l0"
    errors = f"{WITH_ERRORS}_l{options.depth}"
    with Experiment("rq4_cost", options) as experiment:
        slices = Slices(options.slice_events, options.rounds)
        lengths = sorted(options.lengths)
        by_seed = [
            _measure(experiment, (marm, hstu, flat, errors), lengths, slices, seed)
            for seed in experiment.seeds
        ]
        costs = over_seeds(by_seed)
        longest = lengths[-1]
        found: dict[str, Any] = {
            **_ratios(by_seed, marm, hstu, flat, longest),
            "with_errors": _ratios(by_seed, errors, hstu, flat, longest),
            "cost_exponent": {name: short(exponent(points)) for name, points in costs.items()},
            "life_of_a_user": {name: _rounded(life(points)) for name, points in costs.items()},
            "slices": asdict(slices),
            "events_per_user_and_batch": short(_crowding(experiment, slices)),
            "formula_macs": {
                name: {
                    n: round(macs_per_event(*_formula(name, n, experiment, slices))) for n in points
                }
                for name, points in costs.items()
            },
            "stored_bytes_per_user": {
                name: round(longest * points[longest].bytes_saved) for name, points in costs.items()
            },
            "points": {
                name: {n: _rounded(point) for n, point in points.items()}
                for name, points in costs.items()
            },
        }
        document = experiment.document(found)
        page = heading("RQ4: cost of training", document) + _page(costs, found, longest)
        plot = experiment.out(".png")
        if plot is not None:
            plot_panels(_panels(costs), plot)
        experiment.finish(document, page)


def _measure(
    experiment: Experiment,
    names: Sequence[str],
    lengths: Sequence[int],
    slices: Slices,
    seed: int,
) -> Costs:
    costs: Costs = {name: {} for name in names}
    for length in lengths:
        common = replace(experiment.common, history_length=length)
        configs = {
            name: common.train_config(experiment.dataset, parse_method(name), seed)
            for name in names
        }
        for name, point in measure_costs(experiment.dataset, configs, slices).items():
            costs[name][length] = point
            print(
                f"n={length} {name}, seed {seed}: {1e3 * point.cpu_s:.2f} CPU ms, "
                f"{1e3 * point.seconds:.2f} ms, {point.macs / 1e6:.1f} M MACs per event",
                flush=True,
            )
    return costs


def over_seeds(by_seed: Sequence[Costs]) -> Costs:
    """Medians over seeds of every figure of every point."""
    return {
        name: {n: _median([one[name][n] for one in by_seed]) for n in points}
        for name, points in by_seed[0].items()
    }


def _median(points: Sequence[CostPoint]) -> CostPoint:
    return _each_field(lambda field: float(np.median([getattr(one, field) for one in points])))


def life(points: Mapping[int, CostPoint]) -> CostPoint:
    """What a user's first n events take in all, n being the longest length: the area under each
    figure over n, which before the shortest length is as it is there."""
    lengths = list(points)

    def area(field: str) -> float:
        figures = [getattr(point, field) for point in points.values()]
        return lengths[0] * figures[0] + float(np.trapezoid(figures, lengths))

    return _each_field(area)


def _each_field(value: Callable[[str], float]) -> CostPoint:
    return CostPoint(**{field.name: value(field.name) for field in fields(CostPoint)})


def _ratios(
    by_seed: Sequence[Costs], marm: str, hstu: str, flat: str, longest: int
) -> dict[str, Any]:
    """MARM's figures over those of the others at the longest length: medians, and all seeds."""
    named = {
        "cost_over_hstu": ("cpu_s", hstu),
        "cost_over_din": ("cpu_s", flat),
        "seconds_over_hstu": ("seconds", hstu),
        "seconds_over_din": ("seconds", flat),
        "macs_over_hstu": ("macs", hstu),
    }
    each = {
        key: [
            getattr(one[marm][longest], field) / getattr(one[other][longest], field)
            for one in by_seed
        ]
        for key, (field, other) in named.items()
    }
    medians = {key: short(float(np.median(ratios))) for key, ratios in each.items()}
    return {
        **medians,
        "per_seed": {key: [short(ratio) for ratio in ratios] for key, ratios in each.items()},
    }


def _crowding(experiment: Experiment, slices: Slices) -> float:
    """Events of a user in a batch, on average: methods that run over a whole history once for all
    of them, as HSTU* does, gain by every further one."""
    size = experiment.common.batch_size
    timed = experiment.dataset.events.user_id[-slices.total_events :]
    users = [len(np.unique(timed[at : at + size])) for at in range(0, len(timed), size)]
    return len(timed) / sum(users)


def _formula(
    name: str, length: int, experiment: Experiment, slices: Slices
) -> tuple[str, CostShape]:
    """A method and its sizes as `marm.interest.costs` takes them."""
    method = parse_method(name)
    (interest,) = method.interests
    per_user = max(1, round(_crowding(experiment, slices)))
    shape = CostShape(
        rows=length,
        dim=experiment.common.dim,
        # Layers of errors have no attention: some vectors of a row times a target.
        layers=method.depth - method.error_layers
        if interest.method in MEMORY_METHODS
        else interest.layers,
        events_per_user=per_user,
        users=max(1, experiment.common.batch_size // per_user),
    )
    return interest.method, shape


def exponent(points: Mapping[int, CostPoint]) -> float:
    """Slope of the logarithm of CPU time over that of n; NaN for a single length."""
    if len(points) < 2:
        return float("nan")
    spent = [point.cpu_s for point in points.values()]
    return float(np.polyfit(np.log(list(points)), np.log(spent), 1)[0])


def _rounded(point: CostPoint) -> dict[str, float | None]:
    return {name: short(value) for name, value in asdict(point).items()}


def _page(costs: Costs, found: Mapping[str, Any], longest: int) -> str:
    body = [
        [
            parse_method(name).title,
            str(n),
            f"{1e3 * point.cpu_s:.3f}",
            f"{1e3 * point.seconds:.3f}",
            f"{point.macs / 1e6:,.2f}",
            f"{found['formula_macs'][name][n] / 1e6:,.2f}",
            f"{point.bytes_read / 1024:,.1f}",
            f"{point.bytes_saved:,.0f}",
            f"{point.vector_bytes:,.0f}",
        ]
        for name, points in costs.items()
        for n, point in points.items()
    ]
    heads = [
        "method",
        "n",
        "CPU ms",
        "ms",
        "M MACs",
        "by formula",
        "KiB read",
        "bytes saved",
        "of vectors",
    ]
    exponents = ", ".join(
        f"{parse_method(name).title} {value}" for name, value in found["cost_exponent"].items()
    )
    crowding = found["events_per_user_and_batch"]
    lives = [
        [
            parse_method(name).title,
            f"{one['cpu_s']:,.2f}",
            f"{one['macs'] / 1e9:,.2f}",
            f"{one['bytes_read'] / 2**20:,.1f}",
            f"{one['bytes_saved'] / 1024:,.1f}",
        ]
        for name, one in found["life_of_a_user"].items()
    ]
    return (
        f"At n={longest}, MARM takes {found['cost_over_hstu']} of the CPU time per event of "
        f"HSTU*, {found['macs_over_hstu']} of its MACs, and {found['cost_over_din']} times the CPU "
        f"time of L=0; with errors {found['with_errors']['cost_over_hstu']}, "
        f"{found['with_errors']['macs_over_hstu']} and {found['with_errors']['cost_over_din']}. "
        f"Exponent of CPU time over n: {exponents}. A user has {crowding} events in a "
        "batch on average.\n\nPer event (MACs of the whole model, forward and backward; by "
        "formula of the method alone, forward):\n\n"
        + markdown_table(heads, body)
        + f"\nThe first {longest:,} events of a user, in such batches:\n\n"
        + markdown_table(["method", "CPU s", "G MACs", "MiB read", "KiB saved"], lives)
    )


def _panels(costs: Costs) -> list[Panel]:
    def lines(field: str, scale: float) -> list[Line]:
        return [
            Line(
                parse_method(name).title,
                list(points),
                [scale * getattr(point, field) for point in points.values()],
                (),
            )
            for name, points in costs.items()
        ]

    return [
        Panel("time", "n", "CPU ms per event", lines("cpu_s", 1e3)),
        Panel("computation", "n", "M MACs per event", lines("macs", 1e-6)),
        Panel("memory", "n", "KiB read per event", lines("bytes_read", 1 / 1024)),
    ]


if __name__ == "__main__":
    main()
