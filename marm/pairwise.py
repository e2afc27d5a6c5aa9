"""The order of one user's events as a loss: what GAUC (Eq. 10) measures.

Log loss rewards knowing how generous a user is, which no ranking of his candidates needs, and pays
for it within the user: the share of positives among his last events rises after a positive, when
fewer of those he has left are positives. The loss of pairs (RankNet, Burges et al. 2005) looks at
order within the user alone. Added to log loss, which keeps predictions calibrated, it is what large
recommenders train ranking with (Sheng et al. 2023, joint ranking and calibration).

Shape legend: B events, P pairs, X predictions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True)
class Pairs:
    """A positive and a negative event of one user, each."""

    positive_P: NDArray[np.int64]  # places in the batch
    negative_P: NDArray[np.int64]
    weight_P: NDArray[np.float32]

    def loss(self, logits_BX: Tensor) -> Tensor:
        """Weighted sum of log(1 + exp(negative - positive)) over pairs and X predictions, a scalar;
        0 without pairs."""
        positive, negative, weight = (
            torch.from_numpy(array).to(logits_BX.device)
            for array in (self.positive_P, self.negative_P, self.weight_P)
        )
        behind_PX = logits_BX[negative] - logits_BX[positive]
        return weight @ nn.functional.softplus(behind_PX.float()).sum(dim=1)


def pairs_within_users(user_B: NDArray[np.int64], label_B: NDArray[np.float32]) -> Pairs:
    """All pairs of a positive and a negative event of one user; NaN labels are in none.

    A pair counts as one half of the mean over the positive's pairs and one half of that over the
    negative's. So a user weighs half as much as his labels do in log loss, whether he has two
    events in the batch or a hundred: the weights of his pairs add up to half of the events that are
    in any.
    """
    positive = np.flatnonzero(label_B >= 0.5)
    negative = np.flatnonzero(label_B < 0.5)
    negative = negative[np.argsort(user_B[negative], kind="stable")]
    first, negatives = _range_of(user_B[negative], user_B[positive])
    positives = _range_of(np.sort(user_B[positive]), user_B[positive])[1]
    winner_P = np.repeat(np.arange(len(positive)), negatives)
    within_P = np.arange(len(winner_P)) - np.repeat(np.cumsum(negatives) - negatives, negatives)
    weight_P = 0.5 / negatives[winner_P] + 0.5 / positives[winner_P]
    return Pairs(
        positive[winner_P],
        negative[first[winner_P] + within_P],
        weight_P.astype(np.float32),
    )


def _range_of(
    sorted_N: NDArray[np.int64], wanted: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each of ``wanted`` begins in ``sorted_N``, and how often it is there."""
    first = np.searchsorted(sorted_N, wanted, side="left")
    return first, np.searchsorted(sorted_N, wanted, side="right") - first
