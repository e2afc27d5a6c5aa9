"""Metrics of ordered lists: recall and NDCG at k, and how far two orders agree.

Shape legend: B events, M items, G windows, W places of a window.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def ranks_of_true(
    true_B: NDArray, scores_BM: NDArray, allowed_BM: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """The place, from 1, of each event's true item among the allowed items, ``[B]``.

    Items of equal score share their middle place, so a model that scores all alike is no better
    than chance. NaN where a score is NaN.

    Args:
        true_B: score of the true item.
        scores_BM: scores of the items it competes with.
        allowed_BM: which of them compete; never the true item itself.
    """
    better = ((scores_BM > true_B[:, None]) & allowed_BM).sum(axis=1)
    equal = ((scores_BM == true_B[:, None]) & allowed_BM).sum(axis=1)
    unknown = np.isnan(true_B) | (np.isnan(scores_BM) & allowed_BM).any(axis=1)
    return np.where(unknown, np.nan, 1.0 + better + equal / 2.0)


def recall_at_k(ranks_B: NDArray, k: int) -> float:
    """Share of the events whose one relevant item is among the first ``k``; NaN for no events."""
    return _mean_of_known(ranks_B, (ranks_B <= k).astype(np.float64))


def ndcg_at_k(ranks_B: NDArray, k: int) -> float:
    """Mean of ``1 / log2(1 + rank)`` of one relevant item, 0 beyond ``k``; NaN for no events."""
    gains = np.where(ranks_B <= k, 1.0 / np.log2(1.0 + np.asarray(ranks_B, np.float64)), 0.0)
    return _mean_of_known(ranks_B, gains)


def _mean_of_known(ranks_B: NDArray, values_B: NDArray) -> float:
    if not len(ranks_B) or np.isnan(ranks_B).any():
        return float("nan")
    return float(values_B.mean())


def pair_agreement(a_GW: NDArray, b_GW: NDArray, valid_GW: NDArray[np.bool_]) -> dict[str, float]:
    """How alike two scores order the pairs within windows, over the pairs of all windows.

    Args:
        a_GW: the first score of each place.
        b_GW: the second.
        valid_GW: which places are filled; pairs of filled places count.

    Returns:
        ``pairs``: number of pairs; ``pairs_alike``: the share that both put in the same order,
        where a pair that either of them ties counts half; ``kendall_tau``: tau-b, which leaves
        ties out. NaN where there is nothing to compare.
    """
    pairs = alike = opposed = tied_a = tied_b = 0
    for lag in range(1, a_GW.shape[1]):
        both = valid_GW[:, lag:] & valid_GW[:, :-lag]
        sign_a = np.sign(a_GW[:, lag:] - a_GW[:, :-lag])[both]
        sign_b = np.sign(b_GW[:, lag:] - b_GW[:, :-lag])[both]
        pairs += len(sign_a)
        alike += int((sign_a * sign_b > 0).sum())
        opposed += int((sign_a * sign_b < 0).sum())
        tied_a += int((sign_a == 0).sum())
        tied_b += int((sign_b == 0).sum())
    ordered = float(pairs - tied_a) * float(pairs - tied_b)
    nan = float("nan")
    return {
        "pairs": float(pairs),
        "pairs_alike": (alike + (pairs - alike - opposed) / 2) / pairs if pairs else nan,
        "kendall_tau": (alike - opposed) / ordered**0.5 if ordered else nan,
    }


def top_recall(a_GW: NDArray, b_GW: NDArray, top: int, kept: int) -> float:
    """Of the ``top`` best places of each window by ``a``, the share among the ``kept`` best by
    ``b``; equal scores are ordered by place. NaN for no windows."""
    if not len(a_GW):
        return float("nan")
    best_a = np.argsort(-a_GW, axis=1, kind="stable")[:, :top]
    best_b = np.argsort(-b_GW, axis=1, kind="stable")[:, :kept]
    is_kept = np.zeros(a_GW.shape, np.bool_)
    np.put_along_axis(is_kept, best_b, True, axis=1)
    return float(np.take_along_axis(is_kept, best_a, axis=1).mean())
