"""Does `marm ab report` find what is there, and only that? A closed loop with the simulated world.

    python -m benchmarks.paper.ab_loop --output benchmarks/results/ab_loop.json

Routing splits simulated users between two arms; what they are shown and do is written to real
exposure and event logs, from which the report is made. Once the second arm puts more of the users'
true taste into its order (and is slower), once it only has another name.

Then both again several hundred times, each on users of its own: how often do intervals miss the
truth?
The last line is JSON.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from app.ab_report.comparison import Comparison
from app.ab_report.plot import plot_report
from app.ab_report.report import AbReport, build_report
from app.ab_report.settings import ReportSettings
from app.ab_report.table import print_report
from app.experiments.args import ExperimentArgs, RoutingArgs
from app.experiments.table import ExperimentTable
from benchmarks.paper.ab_repeats import Repeats, repeat_experiments
from benchmarks.paper.ab_world import EXPERIMENT, STAGE, Policy, Traffic, live
from benchmarks.perf.figures import (
    Figure,
    Measured,
    at_least,
    at_most,
    exactly,
    json_line,
    print_table,
    write_result,
)
from cache_actors.event_log.log import EventLog
from cache_actors.exposure_log.segments import write_segment
from cache_actors.home import Home
from stages.request import STAGES, StageName
from train.data.world import World
from train.data.world_config import WorldConfig

CONTROL = Policy("control", taste_weight=0.5)
BETTER = Policy("more-taste", taste_weight=0.75, latency_ms=21.5)
MUCH_BETTER = Policy("much-more-taste", taste_weight=1.0)
"""For small experiments, which would hardly ever find less."""
SAME = Policy("same", taste_weight=0.5)
POLICIES = (CONTROL, BETTER, MUCH_BETTER, SAME)
WEIGHT = 0.5
HEADLINE = "long_view_rate"


@dataclass(frozen=True)
class Scale:
    """How much is simulated."""

    users: int = 4_000
    history_per_user: int = 40
    groups: int = 400
    users_per_group: int = 150
    group_history_per_user: int = 15
    seed: int = 0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in asdict(Scale()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--home", help="keep the logs of the planted effect here (a new directory)")
    parser.add_argument("--output", help="write the JSON here as well")
    parser.add_argument("--plot", help="write the forest plot of the planted effect here")
    options = vars(parser.parse_args(argv))
    output, plot, kept = (options.pop(name) for name in ("output", "plot", "home"))
    scale, began = Scale(**options), time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        planted = run_loop(Path(kept or f"{scratch}/planted"), BETTER, scale)
        # Other users than those of the planted effect, so that not one draw decides both.
        null = run_loop(Path(scratch) / "null", SAME, replace(scale, seed=scale.seed + 1))
    repeats = repeat_experiments(
        CONTROL,
        MUCH_BETTER,
        groups=scale.groups,
        users_per_group=scale.users_per_group,
        history=scale.group_history_per_user,
        seed=scale.seed + 2,
    )
    console = Console(width=140)
    for report in (planted, null):
        print_report(report, console)
    if plot is not None:
        plot_report(planted, Path(plot))
    measured = [loop_figures(planted, null), repeat_figures(repeats)]
    print_table("A/B closed loop", measured)
    settings = asdict(scale) | {"policies": [asdict(p) for p in POLICIES]}
    elapsed_s = time.perf_counter() - began
    write_result(json_line("ab_loop", measured, settings, elapsed_s), output)


def run_loop(path: Path, other: Policy, scale: Scale) -> AbReport:
    """Simulate an experiment between `CONTROL` and ``other``, log it under ``path``, report."""
    home = Home(path).create()
    log = EventLog(home.log)
    if log.num_events():
        raise ValueError(f"{path} holds events already; give a new directory")
    world = World(
        WorldConfig(
            num_users=scale.users, num_events=scale.users * scale.history_per_user, seed=scale.seed
        )
    )
    for events in world.stream():
        log.append(events)
    arm = assigned_arms(other.name, scale.users)
    lived = live(world, (CONTROL, other), arm, Traffic(), scale.seed)
    write_segment(home.exposures, lived.exposures)
    log.append(lived.events)
    weights = {EXPERIMENT: {CONTROL.name: WEIGHT, other.name: 1 - WEIGHT}}
    return build_report(home, ReportSettings(controls={EXPERIMENT: CONTROL.name}, weights=weights))


def assigned_arms(other: str, users: int) -> NDArray[np.int64]:
    """Routing's arm of users 1 to ``users``: 0 for the control, 1 for ``other``."""
    arms = {CONTROL.name: WEIGHT, other: 1 - WEIGHT}
    routing = RoutingArgs(experiments={EXPERIMENT: ExperimentArgs(stage=STAGE, arms=arms)})
    variants: dict[StageName, tuple[str, ...]] = dict.fromkeys(STAGES, ("default",))
    variants[STAGE] = tuple(arms)
    table = ExperimentTable(routing, variants)
    return np.array(
        [table.assign(user, {}).arms[STAGE] == other for user in range(1, users + 1)], np.int64
    )


def loop_figures(planted: AbReport, null: AbReport) -> Measured:
    """What the two reports from the logs say."""
    found, latency = headline(planted, HEADLINE), headline(planted, "latency_mean_ms")
    nothing = null.experiments[0].comparisons
    figures = (
        Figure(
            "planted_found",
            f"the interval of the better arm's {HEADLINE} is above zero",
            exactly(float(found.lift.absolute.low > 0 and found.verdict == "higher")),
            at_least(1),
        ),
        Figure(
            "planted_latency_found",
            "the guard says that the better arm is slower",
            exactly(float(latency.verdict == "higher")),
            at_least(1),
        ),
        Figure(
            "null_found",
            "comparisons in which the arm that only has another name differs",
            exactly(float(sum(row.verdict != "unclear" for row in nothing))),
            at_most(0),
        ),
        Figure(
            "null_excludes_zero",
            f"its interval of {HEADLINE} excludes zero",
            exactly(float(headline(null, HEADLINE).lift.absolute.excludes_zero)),
            at_most(0),
        ),
        Figure(
            "sample_ratio_p",
            "smaller p value of the two sample ratio checks",
            exactly(min(_ratio_p(planted), _ratio_p(null))),
            at_least(1e-3),
        ),
    )
    lift = found.lift.relative
    return Measured(
        figures,
        {
            "planted lift of long views, %": 100 * lift.value,
            "low, %": 100 * lift.low,
            "high, %": 100 * lift.high,
            "variance removed by CUPED, %": 100 * found.variance_reduction,
        },
    )


def repeat_figures(repeats: Repeats) -> Measured:
    """What many small experiments say."""
    figures, errors = [], []
    for name, what, nominal, found in (
        ("false_positive_rate", "no effect, yet a 95% interval excludes 0", 0.05, repeats.null),
        ("coverage", "an effect, and the 95% interval holds it", 0.95, repeats.covered),
        ("power", "an effect, and the 95% interval excludes 0", None, repeats.found),
    ):
        for method, flags in found.items():
            share = float(flags.mean())
            description = f"{what}: {method}, {len(flags)} experiments"
            figures.append(Figure(f"{name}_{method}", description, exactly(share)))
            if nominal is not None:
                errors.append(abs(share - nominal))
    off = "largest distance of those rates from 0.05, and of the coverages from 0.95"
    figures.append(Figure("calibration_error", off, exactly(max(errors)), at_most(0.03)))
    true_lift = 100 * repeats.true_lift / repeats.control_mean
    return Measured(tuple(figures), {"lift of long views in the small experiments, %": true_lift})


def headline(report: AbReport, metric: str) -> Comparison:
    """The one comparison of a metric in a report on two arms."""
    (row,) = (row for row in report.experiments[0].comparisons if row.metric == metric)
    return row


def _ratio_p(report: AbReport) -> float:
    ratio = report.experiments[0].sample_ratio
    return 0.0 if ratio is None else ratio.p_value


if __name__ == "__main__":
    main()
