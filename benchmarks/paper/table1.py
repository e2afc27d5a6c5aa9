"""Table 1: every method on its own, under the same conditions.

    python -m benchmarks.paper.table1 --data ratings.parquet --seeds 3 --out results

Each method is one model in one test-then-train pass; only how it models interest differs. The last
line is JSON.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.paper.options import Experiment, trial_options
from benchmarks.paper.plan import parse_methods
from benchmarks.paper.plots import plot_methods
from benchmarks.paper.report import heading, method_rows, methods_table, rows_to_dict

METHODS = (
    "sum_pooling,din,sim_soft,sim_hard,twin,twin_v2,stca_l1,stca_l2,hstu_l2,decoder_l2,"
    "marm_l0,marm_l1,marm_l2,marm_l4,marm_sim_l2,marm_e_l1,marm_e_l2,marm_e_l4"
)
REFERENCES = ("marm_l0", "sum_pooling")


def main(argv: Sequence[str] | None = None) -> None:
    """Run all methods and seeds, and report."""
    parser = trial_options("table1", __doc__)
    parser.add_argument("--methods", default=METHODS, help="names, as benchmarks/paper/plan.py has")
    options = parser.parse_args(argv)
    methods = parse_methods(options.methods)
    with Experiment("table1", options) as experiment:
        results = experiment.run_seeds({one.name: experiment.config(one) for one in methods})
        titles = {one.name: one.title for one in methods}
        rows = method_rows(results, titles, experiment.window)
        document = experiment.document({"methods": rows_to_dict(rows)})
        references = [name for name in REFERENCES if name in results]
        table = heading("Individual methods", document) + methods_table(rows, references)
        plot = experiment.out(".png")
        if plot is not None:
            plot_methods(rows, experiment.floor["gauc"], experiment.dataset.name, plot)
        experiment.finish(document, table)


if __name__ == "__main__":
    main()
