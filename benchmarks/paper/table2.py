"""Table 2: methods added one by one, each kept when it brings a significant gain.

    python -m benchmarks.paper.table2 --data ratings.parquet --seeds 3 --out results

The ensemble starts as the baseline. A step puts one more method beside those kept so far, and is
kept itself when the paired interval of the gain in GAUC is above zero. MARM comes last, deeper and
deeper; a deeper one takes the place of a shallower one. The last line is JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.paper.options import Experiment, trial_options
from benchmarks.paper.plan import Method, parse_methods
from benchmarks.paper.plots import plot_methods
from benchmarks.paper.report import (
    difference_to_dict,
    heading,
    method_rows,
    methods_table,
    rows_to_dict,
)
from benchmarks.paper.statistics import PairedDifference, paired_difference
from benchmarks.paper.trial import TrialResult

METHODS = "sum_pooling,din,sim_soft,twin,twin_v2,hstu_l2,marm_l1,marm_l2,marm_l4,marm_e_l2"


@dataclass(frozen=True)
class Step:
    """One method tried beside those kept before."""

    added: Method
    ensemble: Method
    gain: PairedDifference | None  # over what was kept before; None for the first

    @property
    def kept(self) -> bool:
        """Whether it stays."""
        return self.gain is None or self.gain.is_gain


def main(argv: Sequence[str] | None = None) -> None:
    """Add, compare, keep or drop; then report."""
    parser = trial_options("table2", __doc__)
    parser.add_argument("--methods", default=METHODS, help="in the order in which they are added")
    options = parser.parse_args(argv)
    with Experiment("table2", options) as experiment:
        steps, results = build_up(experiment, parse_methods(options.methods))
        titles = {step.ensemble.name: _title(step) for step in steps}
        rows = method_rows(results, titles, experiment.window)
        document = experiment.document(
            {"steps": [_step(step) for step in steps], "ensembles": rows_to_dict(rows)}
        )
        table = methods_table(rows, [rows[0].name])
        note = "Each row is the methods kept so far and one more. Compared with what was kept:\n\n"
        page = heading("Ensemble", document) + note + _gains(steps) + "\n" + table
        plot = experiment.out(".png")
        if plot is not None:
            plot_methods(rows, experiment.floor["gauc"], experiment.dataset.name, plot)
        experiment.finish(document, page)


def build_up(
    experiment: Experiment, methods: Sequence[Method]
) -> tuple[list[Step], dict[str, list[TrialResult]]]:
    """All steps, and the results of their ensembles by name."""
    kept = methods[0]
    results = experiment.run_seeds({kept.name: experiment.config(kept)})
    steps = [Step(kept, kept, None)]
    for added in methods[1:]:
        ensemble = kept.plus(added)
        results |= experiment.run_seeds({ensemble.name: experiment.config(ensemble)})
        first, second = (
            experiment.predictions(results[name]) for name in (ensemble.name, kept.name)
        )
        steps.append(Step(added, ensemble, paired_difference(first, second)))
        if steps[-1].kept:
            kept = ensemble
        verdict = "kept" if steps[-1].kept else "not kept"
        print(f"+ {added.title}: {verdict}", flush=True)
    return steps, results


def _title(step: Step) -> str:
    return step.added.title if step.gain is None else f"+ {step.added.title}"


def _step(step: Step) -> dict[str, object]:
    return {
        "added": step.added.name,
        "ensemble": step.ensemble.name,
        "gain": None if step.gain is None else difference_to_dict(step.gain),
        "kept": step.kept,
    }


def _gains(steps: Sequence[Step]) -> str:
    lines = []
    for step in steps:
        if step.gain is not None:
            gain, verdict = step.gain.difference, "kept" if step.kept else "not kept"
            lines.append(
                f"- {_title(step)}: {gain.value:+.4f} GAUC ({gain.low:+.4f} .. {gain.high:+.4f}), "
                f"{verdict}"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
