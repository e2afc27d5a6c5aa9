"""Results of methods over seeds as rows: for JSON, as a Markdown table, and for a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.paper.statistics import PairedDifference, Spread, paired_difference, quality
from benchmarks.paper.trial import Predictions, TrialResult


@dataclass(frozen=True)
class MethodRow:
    """One method over all its seeds."""

    name: str
    title: str
    quality: dict[str, Spread]  # "auc", "gauc", "log_loss"
    events_per_s: Spread  # by the clock
    events_per_cpu_s: Spread
    differences: dict[str, PairedDifference]  # in GAUC, by the name of the other method

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not known is null."""
        return {
            "title": self.title,
            **{name: _spread(spread) for name, spread in self.quality.items()},
            "events_per_s": _spread(self.events_per_s),
            "events_per_cpu_s": _spread(self.events_per_cpu_s),
            "gauc_difference_to": {
                name: difference_to_dict(found) for name, found in self.differences.items()
            },
        }


def method_rows(
    results: Mapping[str, Sequence[TrialResult]],
    titles: Mapping[str, str],
    window: str,
    references: Sequence[str] | None = None,
) -> list[MethodRow]:
    """A row per method, compared with every method of ``references`` (by default, with all).

    Args:
        results: by name, one result per seed.
        titles: by name, what a table calls it.
        window: which predictions count.
        references: names among ``results``.
    """
    found = {name: [one.windows[window] for one in seeds] for name, seeds in results.items()}
    others = list(results) if references is None else references
    return [
        MethodRow(
            name,
            titles[name],
            quality(found[name]),
            Spread.of([one.cost.events_per_s for one in seeds]),
            Spread.of([one.cost.events_per_cpu_s for one in seeds]),
            _differences(found, name, others),
        )
        for name, seeds in results.items()
    ]


def _differences(
    found: Mapping[str, list[Predictions]], name: str, others: Sequence[str]
) -> dict[str, PairedDifference]:
    """Without those of a method that predicted something else than numbers."""
    if _diverged(found[name]):
        return {}
    return {
        other: paired_difference(found[name], found[other])
        for other in others
        if other != name and not _diverged(found[other])
    }


def _diverged(seeds: Sequence[Predictions]) -> bool:
    return any(bool(np.isnan(one.score).any()) for one in seeds)


def rows_to_dict(rows: Sequence[MethodRow]) -> dict[str, Any]:
    """All rows by name."""
    return {row.name: row.to_dict() for row in rows}


def difference_to_dict(found: PairedDifference) -> dict[str, Any]:
    """Plain values for JSON."""
    return {
        "difference": short(found.difference.value),
        "low": short(found.difference.low),
        "high": short(found.difference.high),
        "p_value": short(found.p_value),
        "per_seed": [short(value) for value in found.per_seed],
        "users": found.users,
        "error_users": short(found.error_users),
        "error_seeds": short(found.error_seeds),
    }


def methods_table(rows: Sequence[MethodRow], references: Sequence[str]) -> str:
    """A Markdown table with the differences to ``references``, names of rows."""
    titles = {row.name: row.title for row in rows}
    heads = ["method", "AUC", "GAUC", "log loss"]
    heads += [f"GAUC less {titles[name]}" for name in references]
    body = [
        [
            row.title,
            *(mean_and_std(row.quality[name]) for name in ("auc", "gauc", "log_loss")),
            *(interval(row.differences.get(name)) for name in references),
            f"{row.events_per_s.mean:,.0f}",
            f"{row.events_per_cpu_s.mean:,.0f}",
        ]
        for row in rows
    ]
    return markdown_table([*heads, "events/s", "events per CPU s"], body)


def markdown_table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, all others are figures."""
    rule = ["---", *("---:" for _ in heads[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *body)) + "\n"


def heading(title: str, document: Mapping[str, Any]) -> str:
    """What a Markdown page begins with: the data, the settings and the floor."""
    settings, floor = document["settings"], document["floor"]
    common = settings["common"]
    return (
        f"# {title}\n\n"
        f"{settings['data']}: {settings['num_events']:,} events, one test-then-train pass, "
        f"{document['evaluated_events']:,} evaluated ({settings['window']} window), "
        f"{document['evaluated_users']:,} users with both labels. "
        f"n={common['history_length']}, d={common['dim']}, batch {common['batch_size']}, "
        f"{settings['seeds']} seeds. Running item mean: AUC {floor['auc']}, "
        f"GAUC {floor['gauc']}.\n\n"
        "± is the standard deviation over seeds. Differences in GAUC are paired user by user, "
        "means over seeds, with 95% intervals over users and seeds; not adjusted for several "
        "comparisons.\n\n"
    )


def short(value: float) -> float | None:
    """Six digits, and null for what is not a number: JSON has no NaN."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _spread(spread: Spread) -> dict[str, Any]:
    return {
        "mean": short(spread.mean),
        "std": short(spread.std),
        "values": [short(value) for value in spread.values],
    }


def mean_and_std(spread: Spread) -> str:
    """``0.7431 ± 0.0007``; without the second for a single seed."""
    if math.isnan(spread.std):
        return f"{spread.mean:.4f}"
    return f"{spread.mean:.4f} ± {spread.std:.4f}"


def interval(found: PairedDifference | None) -> str:
    """``+0.0040 (+0.0021 .. +0.0059)``; empty where nothing was compared."""
    if found is None:
        return ""
    estimate = found.difference
    return f"{estimate.value:+.4f} ({estimate.low:+.4f} .. {estimate.high:+.4f})"
