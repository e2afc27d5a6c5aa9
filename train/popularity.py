"""Popularity: how often each item was a positive lately, the least that retrieval has to beat."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from train.seen_catalog import grown

HALF_LIFE_POSITIVES = 100_000
"""A positive event counts half after so many others, so that what is popular now comes first."""

_RESCALE = 2.0**200


class Popularity:
    """Positive events of each item, by its place, that fade as others come in."""

    def __init__(self) -> None:
        self._counts = np.zeros(1024)
        self._weight = 1.0  # of an event now; grows, so that older ones need no touch

    def add(self, places: NDArray[np.int64]) -> None:
        """Count positive events of the items at ``places``, all of one moment."""
        if not len(places):
            return
        self._counts = grown(self._counts, int(places.max()) + 1)
        np.add.at(self._counts, places, self._weight)
        self._weight *= 2.0 ** (len(places) / HALF_LIFE_POSITIVES)
        if self._weight > _RESCALE:
            self._counts /= self._weight
            self._weight = 1.0

    def scores(self, num_items: int) -> NDArray[np.float64]:
        """Faded counts of the first ``num_items`` places, below 1 and in their proportions."""
        counts = grown(self._counts, num_items)[:num_items]
        return counts / (counts.sum() + self._weight)

    def state(self) -> NDArray[np.float64]:
        """The weight of an event, then the counts; `load` reads it back."""
        return np.concatenate([[self._weight], self._counts])

    def load(self, state: NDArray[np.float64]) -> None:
        """Continue from `state`."""
        self._weight, self._counts = float(state[0]), state[1:].copy()
