"""Ranking metrics: AUC, GAUC (Eq. 10) and XAUC."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def auc(labels: NDArray, scores: NDArray) -> float:
    """Area under the ROC curve; ties count half. NaN when one class is absent."""
    labels = np.asarray(labels) > 0
    num_pos = int(labels.sum())
    num_neg = len(labels) - num_pos
    if num_pos == 0 or num_neg == 0:
        return float("nan")
    return _auc_from_ranks(_average_ranks(np.asarray(scores)), labels, num_pos, num_neg)


def gauc(user_ids: NDArray, labels: NDArray, scores: NDArray) -> float:
    """Eq. (10): mean AUC over users with both labels, weighted by their number of samples.

    NaN when no user has both labels.
    """
    total = weight = 0.0
    order = np.argsort(user_ids, kind="stable")
    _, starts = np.unique(np.asarray(user_ids)[order], return_index=True)
    for run in np.split(order, starts[1:]):
        value = auc(labels[run], scores[run])
        if not np.isnan(value):
            total += len(run) * value
            weight += len(run)
    return total / weight if weight else float("nan")


def log_loss(labels: NDArray, probabilities: NDArray) -> float:
    """Mean binary cross-entropy in nats; NaN for no samples."""
    if not len(labels):
        return float("nan")
    p = np.clip(np.asarray(probabilities, np.float64), 1e-7, 1 - 1e-7)
    y = np.asarray(labels, np.float64)
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log1p(-p)))


def xauc(values: NDArray, scores: NDArray, num_pairs: int = 100_000, seed: int = 0) -> float:
    """Share of random pairs of samples whose order by ``scores`` is their order by ``values``.

    Pairs with equal values are left out; equal scores count half. NaN when no pair differs.
    """
    if len(values) < 2:
        return float("nan")
    rng = np.random.default_rng(seed)
    i, j = rng.integers(0, len(values), (2, num_pairs))
    true_sign = np.sign(np.asarray(values)[i] - np.asarray(values)[j])
    score_sign = np.sign(np.asarray(scores)[i] - np.asarray(scores)[j])
    kept = true_sign != 0
    if not kept.any():
        return float("nan")
    return float(np.mean((1 + true_sign[kept] * score_sign[kept]) / 2))


def _average_ranks(scores: NDArray) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def _auc_from_ranks(ranks: NDArray, positive: NDArray, num_pos: int, num_neg: int) -> float:
    return float((ranks[positive].sum() - num_pos * (num_pos + 1) / 2.0) / (num_pos * num_neg))
