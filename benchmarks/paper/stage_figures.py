"""Figures of cascading and retrieval with memories of different writers, paired user by user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.paper.stage_runs import Ranks, StageRun, paired_means, stage_predictions
from benchmarks.paper.statistics import PairedDifference, Spread, paired_difference, quality
from marm.ranking_metrics import ndcg_at_k, recall_at_k
from train.agreement import agreement
from train.retrieval_metrics import CUTOFFS

MEMORIES = ("shared", "own", "none")
_PAIRS = (("shared", "none"), ("own", "none"), ("shared", "own"))
_AGREEMENT = ("pairs_alike", "kendall_tau", "top_5_recall")
AT_K = {"recall": recall_at_k, "ndcg": ndcg_at_k}


@dataclass(frozen=True)
class Measured:
    """One stage: every figure with every memory, and the paired differences."""

    figures: dict[str, dict[str, Spread]]  # by memory, by figure
    differences: dict[str, dict[str, PairedDifference]]  # by "a less b", by figure


def run_name(memory: str, stage: str) -> str:
    """The pass in which a stage is trained with a memory."""
    return f"own {stage}" if memory == "own" else memory


def measure_cascading(runs: Sequence[dict[str, StageRun]]) -> Measured:
    """GAUC, and agreement with ranking; differences are of GAUC, paired user by user."""
    found = {
        memory: [run[run_name(memory, "cascading")].predictions["cascading"] for run in runs]
        for memory in MEMORIES
    }
    judges = [stage_predictions(run["shared"].predictions["ranking"]) for run in runs]
    figures = {}
    for memory, predictions in found.items():
        agreed = [
            agreement(judge, stage_predictions(one), judge.tasks[0])
            for judge, one in zip(judges, predictions, strict=True)
        ]
        figures[memory] = {
            "gauc": quality(predictions)["gauc"],
            **{name: Spread.of([one[name] for one in agreed]) for name in _AGREEMENT},
        }
    return Measured(
        figures,
        {f"{a} less {b}": {"gauc": paired_difference(found[a], found[b])} for a, b in _PAIRS},
    )


def measure_retrieval(runs: Sequence[dict[str, StageRun]]) -> Measured:
    """Recall and NDCG at every cutoff, beside the baselines; all differences paired user by user.

    Raises:
        ValueError: when no positive event is evaluated.
    """
    sampled = {
        memory: [_ranks(run[run_name(memory, "retrieval")]) for run in runs] for memory in MEMORIES
    }
    ranks = {name: [one.by_method["retrieval"] for one in of] for name, of in sampled.items()}
    first = sampled["none"]
    baselines = {
        name: [one.by_method[name] for one in first] for name in ("popularity", "item_to_item")
    }
    figures = {
        name: {
            f"{metric}@{k}": Spread.of([at_k(one, k) for one in of])
            for metric, at_k in AT_K.items()
            for k in CUTOFFS
        }
        for name, of in (ranks | baselines).items()
    }
    differences = {
        f"{a} less {b}": {
            f"{metric}@{k}": _paired(first[0].user_id, at_k, k, ranks[a], ranks[b])
            for metric, at_k in AT_K.items()
            for k in CUTOFFS
        }
        for a, b in _PAIRS
    }
    return Measured(figures, differences)


def _ranks(run: StageRun) -> Ranks:
    if run.ranks is None:
        raise ValueError("no positive event was sampled in the window; evaluate more events")
    return run.ranks


def _paired(
    user_id: NDArray[np.int64],
    at_k: Callable[[NDArray, int], float],
    k: int,
    first: Sequence[NDArray[np.float64]],
    second: Sequence[NDArray[np.float64]],
) -> PairedDifference:
    def gains(ranks_E: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([at_k(ranks_E[i : i + 1], k) for i in range(len(ranks_E))])

    return paired_means(user_id, [gains(one) for one in first], [gains(one) for one in second])
