"""Which of the scored candidates are shown, and in which order, so that neighbours differ.

Shapes: M candidates. All rules fill the places of an answer from the first to the last, each with
the candidate that has the highest value given what its author and tag already have nearby; of
equal ones the higher score comes first, and then the one that came first. So they are
deterministic, and they always fill as many places as there are candidates for. An unknown author or
tag (0) is like no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from marm.items import ItemFeatures
from stages.fusion import best_first


@dataclass(frozen=True)
class Selection:
    """Positions of the chosen candidates in the order to show them; ``note`` says when the rule
    could not be kept."""

    positions: NDArray[np.int64]
    note: str = ""


class Diversity(Protocol):
    """A rule for choosing from scored candidates."""

    def select(self, items: ItemFeatures, scores_M: NDArray[np.float32], limit: int) -> Selection:
        """The ``min(limit, M)`` candidates to show, best place first."""
        ...


@dataclass(frozen=True)
class ByScore:
    """The highest scores, whatever they are of."""

    def select(self, items: ItemFeatures, scores_M: NDArray[np.float32], limit: int) -> Selection:
        """See `Diversity.select`."""
        return Selection(best_first(scores_M, limit))


@dataclass(frozen=True)
class WindowCaps:
    """At most ``max_per_author`` items of an author and ``max_per_tag`` of a tag in any ``window``
    consecutive places (None: as many as there are).

    Where every candidate left would break a cap, the place goes to the best of those that break
    the fewest caps, and the selection's note counts such places.
    """

    window: int
    max_per_author: int | None
    max_per_tag: int | None

    def select(self, items: ItemFeatures, scores_M: NDArray[np.float32], limit: int) -> Selection:
        """See `Diversity.select`."""
        # Ranks instead of scores: a broken cap must outweigh any difference of scores.
        order = best_first(scores_M, len(scores_M))
        rank_M = np.arange(len(order), dtype=np.float64)
        broken = float(len(order) + 1)
        groups = [
            _Groups.of(ids[order], cap, broken)
            for ids, cap in (
                (items.author_id, self.max_per_author),
                (items.tag_id, self.max_per_tag),
            )
            if cap is not None
        ]
        places, relaxed = _fill(-rank_M, groups, self.window, limit)
        note = (
            f"diversity: caps were exceeded in {relaxed} of {len(places)} places for lack of "
            "other candidates"
            if relaxed
            else ""
        )
        return Selection(order[places], note)


@dataclass(frozen=True)
class MarginalRelevance:
    """Maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998) by author and tag.

    A place goes to the highest ``r - author_penalty * a - tag_penalty * t``: ``r`` is the score,
    scaled to 0 for the worst candidate and 1 for the best; ``a`` and ``t`` are 1 when one of the
    ``window`` - 1 places before has the same author or tag, and 0 otherwise.
    """

    window: int
    author_penalty: float
    tag_penalty: float

    def select(self, items: ItemFeatures, scores_M: NDArray[np.float32], limit: int) -> Selection:
        """See `Diversity.select`."""
        order = best_first(scores_M, len(scores_M))
        groups = [
            _Groups.of(ids[order], 1, penalty)
            for ids, penalty in (
                (items.author_id, self.author_penalty),
                (items.tag_id, self.tag_penalty),
            )
            if penalty
        ]
        relevance_M = _scaled(scores_M[order])
        return Selection(order[_fill(relevance_M, groups, self.window, limit)[0]])


@dataclass(frozen=True)
class _Groups:
    """The candidates by author or by tag, and what a group costs that is full."""

    group_M: list[int]  # -1: unknown
    members: list[NDArray[np.int64]]
    count: list[int]  # items of each group within the window
    is_full_M: NDArray[np.bool_]  # of the candidate's group
    cap: int
    penalty: float

    @staticmethod
    def of(ids_M: NDArray[np.int64], cap: int, penalty: float) -> _Groups:
        """Groups of equal ids; the unknown id 0 makes no group."""
        ids, group_M, sizes = np.unique(ids_M, return_inverse=True, return_counts=True)
        members = np.split(np.argsort(group_M, kind="stable"), np.cumsum(sizes)[:-1])
        group_M = np.where(ids_M == 0, -1, group_M)
        is_full_M = np.zeros(len(ids_M), np.bool_)
        return _Groups(group_M.tolist(), members, [0] * len(ids), is_full_M, cap, penalty)

    def shift(self, position: int, by: int) -> NDArray[np.int64] | None:
        """Count a candidate that enters the window (1) or leaves it (-1); the candidates whose
        group filled up or became free by that."""
        group = self.group_M[position]
        if group < 0:
            return None
        was_full = self.count[group] >= self.cap
        self.count[group] += by
        is_full = self.count[group] >= self.cap
        if was_full == is_full:
            return None
        self.is_full_M[self.members[group]] = is_full
        return self.members[group]


def _fill(
    plain_M: NDArray[np.float64], rules: list[_Groups], window: int, limit: int
) -> tuple[NDArray[np.int64], int]:
    """Fill places one by one: positions ``[K]``, and how many of them had a penalty.

    Candidates come best first, so that ``argmax`` gives a tie to the better one. A step costs one
    look at all values, and an update of the groups that filled up or became free.
    """
    plain_M, value_M = plain_M.copy(), plain_M.copy()
    places: list[int] = []
    num_penalised = 0
    for place in range(min(limit, len(plain_M))):
        if place >= window:
            _shift(places[place - window], -1, rules, plain_M, value_M)
        chosen = int(value_M.argmax())
        num_penalised += bool(value_M[chosen] < plain_M[chosen])
        places.append(chosen)
        plain_M[chosen] = value_M[chosen] = -np.inf
        _shift(chosen, 1, rules, plain_M, value_M)
    return np.array(places, np.int64), num_penalised


def _shift(
    position: int,
    by: int,
    rules: list[_Groups],
    plain_M: NDArray[np.float64],
    value_M: NDArray[np.float64],
) -> None:
    for rule in rules:
        changed = rule.shift(position, by)
        if changed is not None:
            # From the plain value each time: taking back what was added would leave rounding.
            value_M[changed] = plain_M[changed] - sum(
                each.penalty * each.is_full_M[changed] for each in rules
            )


def _scaled(scores_M: NDArray[np.float32]) -> NDArray[np.float64]:
    """Scores from best to worst, as 1 to 0; all 1 when they are equal."""
    wide_M = scores_M.astype(np.float64)
    if not len(wide_M) or wide_M[0] == wide_M[-1]:
        return np.ones(len(wide_M))
    return (wide_M - wide_M[-1]) / (wide_M[0] - wide_M[-1])
