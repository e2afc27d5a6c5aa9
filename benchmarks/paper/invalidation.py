"""Cache invalidation: what stored rows are worth when histories change after they were computed.

    python -m benchmarks.paper.invalidation --data ratings.parquet --seeds 3 --out results

MARM streams up to the window. There, of the users who come back, a share of the past events is
changed (``--change replace``: another random item, feedback as it was; ``remove``: taken out), and
rows that depend on a change are treated in the ways of `benchmarks.paper.changed_histories`.
Through the window the pass goes on learning from unchanged histories, and its weights read and
write each of the changed memories too (`benchmarks.paper.shadow_memory`), so that predictions
differ by the memory alone. ``refreshed`` is nothing changed and every visible row computed again;
``forgotten`` has no past at all, which says how much any change could have cost.
GAUC is that of the window, and of the users who come back alone. The last line is JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.paper.changed_histories import CHANGES, TREATMENTS, Overhead
from benchmarks.paper.invalidated_memories import FORGOTTEN, REFRESHED, InvalidationWatch
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
from benchmarks.paper.statistics import (
    PairedDifference,
    Spread,
    paired_difference,
    quality,
    user_aucs,
)
from benchmarks.paper.trial import Predictions
from benchmarks.paper.watched_pass import first_of, predictions_at, run_watched
from marm.memory_arrays import ArrayMemory
from train.config import TrainConfig

PERCENTS = (10, 25, 50)
UNCHANGED = "unchanged"


@dataclass(frozen=True)
class SeedFindings:
    """What one pass showed, by condition."""

    predictions: dict[str, Predictions]
    overheads: dict[str, Overhead]
    valid_by_layer: dict[int, list[float]]  # by percent; visible rows that depend on no change
    returning: NDArray[np.int64]  # users with a history when the window begins


@dataclass(frozen=True)
class Score:
    """GAUC over all seeds."""

    gauc: Spread
    less_unchanged: PairedDifference | None  # None for what is unchanged


@dataclass(frozen=True)
class Condition:
    """One condition over all seeds."""

    window: Score
    returning: Score  # of the users who come back
    overhead: dict[str, float]  # means over seeds


def main(argv: Sequence[str] | None = None) -> None:
    """Stream, change, treat, report."""
    parser = common_options("invalidation", __doc__)
    ask_for_memory(parser)
    parser.add_argument("--change", choices=CHANGES, default=CHANGES[0], help="what happens")
    parser.add_argument("--percents", type=int, nargs="+", default=PERCENTS, help="events changed")
    options = parser.parse_args(argv)
    method = method_with_memory(parser, options)
    if not all(0 < percent <= 100 for percent in options.percents):
        parser.error(f"--percents must be from 1 to 100, got {options.percents}")
    program = program_of(program_of("invalidation", options.method), options.change, CHANGES[0])
    with Experiment(program, options) as experiment:
        config = experiment.config(method)
        found = [
            findings_of_seed(experiment, seeded(config, seed), options.change, options.percents)
            for seed in experiment.seeds
        ]
        conditions = summarise(found)
        document = experiment.document(
            {
                "method": method.name,
                "depth": options.depth,
                "change": options.change,
                "returning_users": [len(one.returning) for one in found],
                "conditions": {name: _to_dict(one) for name, one in conditions.items()},
                "valid_by_layer": {
                    percent: [
                        short(float(value))
                        for value in np.mean([one.valid_by_layer[percent] for one in found], axis=0)
                    ]
                    for percent in options.percents
                },
            }
        )
        page = heading("Cache invalidation", document) + _page(document, conditions)
        plot = experiment.out(".png")
        if plot is not None:
            plot_panels(_panels(conditions, options.percents), plot)
        experiment.finish(document, page)


def findings_of_seed(
    experiment: Experiment, config: TrainConfig, change: str, percents: Sequence[int]
) -> SeedFindings:
    """One pass in this process, with all changed memories beside it."""
    dataset, memory = experiment.dataset, ArrayMemory(config.namespace)
    watch = InvalidationWatch(dataset, memory, change, percents, config.seed)
    since = first_of(dataset, experiment.window)
    done = run_watched(dataset, config, memory, since, watch.watch)
    kept = np.flatnonzero(dataset.window(experiment.window))
    live = predictions_at(dataset, kept, done.score_N[kept])
    print(
        f"seed {config.seed}: GAUC {user_aucs(live).gauc:.4f}, {done.cost.seconds:,.0f} s, "
        f"{done.cost.events_per_s:,.0f} events/s, {done.cost.cpu_s:,.0f} CPU s",
        flush=True,
    )
    predictions = {UNCHANGED: live, **watch.predictions(experiment.window)}
    return SeedFindings(predictions, watch.overheads, watch.valid_by_layer, watch.returning)


def summarise(found: Sequence[SeedFindings]) -> dict[str, Condition]:
    """Every condition over the seeds, compared user by user with nothing changed."""
    conditions = {}
    for name in found[0].predictions:
        overheads = [asdict(one.overheads[name]) for one in found if name in one.overheads]
        conditions[name] = Condition(
            _score([one.predictions for one in found], name),
            _score([_of_returning(one) for one in found], name),
            {
                figure: float(np.mean([one[figure] for one in overheads]))
                for figure in (overheads[0] if overheads else ())
            },
        )
    return conditions


def _score(seeds: Sequence[dict[str, Predictions]], name: str) -> Score:
    own = [found[name] for found in seeds]
    gauc = quality(own)["gauc"]
    if name == UNCHANGED:
        return Score(gauc, None)
    return Score(gauc, paired_difference(own, [found[UNCHANGED] for found in seeds]))


def _of_returning(found: SeedFindings) -> dict[str, Predictions]:
    return {name: of_users(one, found.returning) for name, one in found.predictions.items()}


def of_users(found: Predictions, users: NDArray[np.int64]) -> Predictions:
    """The predictions of some users' events."""
    kept = np.isin(found.user_id, users)
    return Predictions(
        found.user_id[kept], found.label[kept], found.score[kept], found.timestamp_ms[kept]
    )


def _score_to_dict(score: Score) -> dict[str, Any]:
    less = score.less_unchanged
    return {
        "gauc": short(score.gauc.mean),
        "std": short(score.gauc.std),
        "less_unchanged": None if less is None else difference_to_dict(less),
    }


def _to_dict(condition: Condition) -> dict[str, Any]:
    return {
        "window": _score_to_dict(condition.window),
        "returning": _score_to_dict(condition.returning),
        **{name: short(value) for name, value in condition.overhead.items()},
    }


def _page(document: dict[str, Any], conditions: dict[str, Condition]) -> str:
    body = []
    for name, one in conditions.items():
        cost = one.overhead
        figures = ["", "", "", ""]
        if cost:
            figures = [f"{cost['hit_rate']:.3f}", f"{cost['valid_share']:.3f}"]
            figures += [f"{cost['events_computed']:,.0f}", f"{cost['cpu_s']:.1f}"]
        scores = [
            cell
            for score in (one.window, one.returning)
            for cell in (mean_and_std(score.gauc), interval(score.less_unchanged))
        ]
        body.append([name, *scores, *figures])
    heads = ["condition", "GAUC", "less unchanged", "GAUC, returning users", "less unchanged"]
    heads += ["hit rate", "valid", "events computed", "CPU s"]
    valid = "; ".join(
        f"{percent}%: {', '.join(f'{share:.3f}' for share in shares)}"
        for percent, shares in document["valid_by_layer"].items()
    )
    return (
        f"Change: {document['change']}. Hit rate: share of the rows that a query of a returning "
        "user can see that have vectors when the window begins. Valid: vectors that depend on no "
        f"changed event; layer by layer from 1, for each share of events changed: {valid}.\n\n"
        + markdown_table(heads, body)
    )


def _panels(conditions: dict[str, Condition], percents: Sequence[int]) -> list[Panel]:
    names = [t for t in TREATMENTS if f"{percents[0]}% {t}" in conditions]
    curves = {t: [conditions[f"{percent}% {t}"] for percent in percents] for t in names}
    gauc = [
        Line(t, percents, [one.returning.gauc.mean for one in of], ()) for t, of in curves.items()
    ]
    for name in (UNCHANGED, REFRESHED, FORGOTTEN):
        level = conditions[name].returning.gauc.mean
        gauc.append(Line(name, percents, [level] * len(percents), ()))
    hits = [
        Line(t, percents, [one.overhead["hit_rate"] for one in of], ()) for t, of in curves.items()
    ]
    return [
        Panel("quality", "% of events changed", "GAUC of returning users", gauc),
        Panel("rows with vectors", "% of events changed", "hit rate", hits),
    ]


if __name__ == "__main__":
    main()
