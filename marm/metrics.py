"""Metrics of predictions: AUC, GAUC (Eq. 10), XAUC, log loss and calibration.

A figure that cannot be known is NaN: of no samples, of one class, or of scores of which one is NaN.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def auc(labels: NDArray, scores: NDArray) -> float:
    """Area under the ROC curve; ties count half. NaN when one class is absent."""
    labels, scores = np.asarray(labels) > 0, np.asarray(scores)
    num_pos = int(labels.sum())
    num_neg = len(labels) - num_pos
    if num_pos == 0 or num_neg == 0 or np.isnan(scores).any():
        return float("nan")
    ranks = _average_ranks(scores)
    return float((ranks[labels].sum() - num_pos * (num_pos + 1) / 2.0) / (num_pos * num_neg))


def gauc(user_ids: NDArray, labels: NDArray, scores: NDArray) -> float:
    """Eq. (10): mean AUC over users with both labels, weighted by their number of samples.

    All users in one pass: (user, score, label) is sorted as one integer, and ranks within a user
    are ranks among all samples, less where the user begins. NaN when no user has both labels.
    """
    user_ids, scores = np.asarray(user_ids), np.asarray(scores)
    if not len(user_ids) or np.isnan(scores).any():
        return float("nan")
    positive = (np.asarray(labels) > 0).astype(np.uint64)
    key = _code(user_ids, 31) << np.uint64(33) | _score_code(scores) << np.uint64(1) | positive
    key.sort()
    positive = (key & np.uint64(1)).astype(np.float64)
    starts = _run_starts(key >> np.uint64(33))
    ties = _run_starts(key >> np.uint64(1))
    counts = np.diff(np.append(starts, len(key)))
    tie_counts = np.diff(np.append(ties, len(key)))
    # Samples of equal score share their middle rank; the first of a user has rank 1.
    tie_positives = np.add.reduceat(positive, ties)
    first_tie = np.searchsorted(ties, starts)
    ties_per_user = np.diff(np.append(first_tie, len(ties)))
    ranks = ties + (tie_counts + 1) / 2.0 - np.repeat(starts, ties_per_user)
    num_pos = np.add.reduceat(positive, starts)
    num_neg = counts - num_pos
    mixed = (num_pos > 0) & (num_neg > 0)
    if not mixed.any():
        return float("nan")
    rank_sums = np.add.reduceat(tie_positives * ranks, first_tie)
    wins = (rank_sums - num_pos * (num_pos + 1) / 2.0)[mixed]
    values = wins / (num_pos * num_neg)[mixed]
    return float((counts[mixed] * values).sum() / counts[mixed].sum())


def log_loss(labels: NDArray, probabilities: NDArray) -> float:
    """Mean binary cross-entropy in nats; NaN for no samples."""
    if not len(labels):
        return float("nan")
    p = np.clip(np.asarray(probabilities, np.float64), 1e-7, 1 - 1e-7)
    y = np.asarray(labels, np.float64)
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log1p(-p)))


def calibration(labels: NDArray, probabilities: NDArray) -> float:
    """Mean prediction over mean label: above 1 the model promises too much. NaN when no label is
    positive."""
    total = float(np.sum(labels, dtype=np.float64))
    if total <= 0:
        return float("nan")
    return float(np.sum(probabilities, dtype=np.float64)) / total


def xauc(values: NDArray, scores: NDArray, num_pairs: int = 100_000, seed: int = 0) -> float:
    """Share of random pairs of samples whose order by ``scores`` is their order by ``values``.

    Pairs with equal values are left out; equal scores count half. NaN when no pair differs.
    """
    if len(values) < 2 or np.isnan(np.asarray(scores, np.float64)).any():
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


def _score_code(scores: NDArray) -> NDArray[np.uint64]:
    """32-bit integers in the order of ``scores``, equal where those are."""
    if scores.dtype != np.float32:
        return _code(scores, 32)
    bits = (scores + np.float32(0)).view(np.uint32)  # adding 0 makes -0 equal to 0
    negative = bits >> np.uint32(31) > 0
    return (bits ^ np.where(negative, np.uint32(0xFFFFFFFF), np.uint32(1 << 31))).astype(np.uint64)


def _code(values: NDArray, num_bits: int) -> NDArray[np.uint64]:
    """Integers below 2^num_bits in the order of ``values``, equal where those are."""
    if values.dtype.kind in "iu" and int(values.max()) - int(values.min()) < 1 << num_bits:
        return (values - values.min()).astype(np.uint64)
    return np.unique(values, return_inverse=True)[1].astype(np.uint64)


def _run_starts(ordered: NDArray) -> NDArray[np.int64]:
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
