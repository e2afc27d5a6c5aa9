"""MARM with SIM (Section 2.2, Eq. 9, Fig. 4): which rows each candidate attends to at a layer.

The general search unit (GSU) is the attention itself: a row's score is the mean over heads of the
layer's own logit, content and recency bias, before the softmax. So the exact search unit (ESU), the
softmax over the rows found, takes the logits that the search has computed. Every layer searches for
itself and finds other rows (Fig. 6).

A model that is trained with a search (`marm_sim`) is served with the same one, unless its arm names
another.

Shape legend: M candidates, N rows (newest first), K rows found, T layers that searched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marm.highest import highest, prepare_highest

CATEGORIES = ("tag", "author", "tag_or_author")

_NOT_FOUND = float("-inf")


@dataclass(frozen=True)
class Categories:
    """Tags and authors of candidates ``[M]`` and rows ``[N]``; 0 is unknown, and equals nothing."""

    candidate_tag: Tensor
    candidate_author: Tensor
    row_tag: Tensor
    row_author: Tensor

    def of_candidates(self, part: slice) -> Categories:
        """The same rows for some of the candidates."""
        return Categories(
            self.candidate_tag[part], self.candidate_author[part], self.row_tag, self.row_author
        )

    def of_rows(self, index_N: Tensor) -> Categories:
        """The same candidates for some of the rows."""
        return Categories(
            self.candidate_tag,
            self.candidate_author,
            self.row_tag[index_N],
            self.row_author[index_N],
        )


@dataclass(frozen=True)
class Found:
    """Rows of each candidate: positions ``[M, K]``, and which of them count."""

    position: Tensor
    valid: Tensor

    def mask(self, num_rows: int) -> Tensor:
        """Of each candidate's rows, those found: bool ``[M, N]``."""
        # One more column takes what does not count.
        position = torch.where(self.valid, self.position, num_rows)
        mask = torch.zeros(len(position), num_rows + 1, dtype=torch.bool, device=position.device)
        return mask.scatter_(1, position, True)[:, :num_rows]


class RowSearch(ABC):
    """Chooses rows per candidate and layer."""

    @abstractmethod
    def takes_all(self, num_rows: int) -> bool:
        """Whether all of so many rows are attended to, so that nothing needs to be searched."""

    def prepare(self) -> None:
        """Do before the first request what takes long."""
        prepare_highest()

    @abstractmethod
    def find(self, scores_MN: Tensor, categories: Categories | None) -> Found:
        """The rows to attend to.

        Args:
            scores_MN: the layer's own scores, see the module.
            categories: of these candidates and rows; None when the request came without.

        Raises:
            ValueError: when the search needs categories and there are none.
        """


@dataclass(frozen=True)
class AllRows(RowSearch):
    """No search: dense attention to the whole history."""

    def takes_all(self, num_rows: int) -> bool:
        """Always."""
        return True

    def prepare(self) -> None:
        """Nothing to do."""

    def find(self, scores_MN: Tensor, categories: Categories | None) -> Found:
        """Every row for every candidate."""
        every_N = torch.arange(scores_MN.shape[1], device=scores_MN.device)
        position = every_N.expand(scores_MN.shape)
        return Found(position, torch.ones_like(position, dtype=torch.bool))


@dataclass(frozen=True)
class TopRows(RowSearch):
    """The K rows of the highest scores (Eq. 9)."""

    k: int

    def __post_init__(self) -> None:
        _check_k(self.k)

    def takes_all(self, num_rows: int) -> bool:
        """When there are no more than K."""
        return num_rows <= self.k

    def find(self, scores_MN: Tensor, categories: Categories | None) -> Found:
        """Among equal scores any may be taken."""
        position = highest(scores_MN, min(self.k, scores_MN.shape[1]))
        return Found(position, torch.ones_like(position, dtype=torch.bool))


@dataclass(frozen=True)
class SameCategory(RowSearch):
    """Hard search of SIM: the K newest rows of the candidate's category, in every layer the same.

    ``by`` is ``tag``, ``author`` or ``tag_or_author``. A candidate none of whose category was seen
    attends to the null key alone.
    """

    by: str
    k: int

    def __post_init__(self) -> None:
        _check_k(self.k)
        if self.by not in CATEGORIES:
            raise ValueError(f"a category search is by one of {CATEGORIES}, got {self.by!r}")

    def takes_all(self, num_rows: int) -> bool:
        """Never: rows of other categories stay out however few there are."""
        return False

    def find(self, scores_MN: Tensor, categories: Categories | None) -> Found:
        """Looks at no score."""
        if categories is None:
            raise ValueError(
                "a category search needs the tags and authors of candidates and rows; ask for "
                "candidates of one user (`InputBuilder.for_candidates`)"
            )
        num_rows = scores_MN.shape[1]
        newest_first = torch.arange(num_rows, 0, -1, dtype=torch.float32, device=scores_MN.device)
        rank_MN = torch.where(self._same(categories), newest_first, _NOT_FOUND)
        position = highest(rank_MN, min(self.k, num_rows))
        return Found(position, rank_MN.gather(1, position) > _NOT_FOUND)

    def _same(self, of: Categories) -> Tensor:
        tag_MN = _equal(of.candidate_tag, of.row_tag)
        if self.by == "tag":
            return tag_MN
        author_MN = _equal(of.candidate_author, of.row_author)
        return author_MN if self.by == "author" else tag_MN | author_MN


def layer_overlap(found: Sequence[Found], num_rows: int) -> Tensor:
    """Fig. 6: the share of rows that two layers have in common, ``[T, T]``.

    The Jaccard index of the rows found, intersection over union, as the mean over candidates;
    candidates for whom neither layer found any count as 1. Positions of all layers must mean the
    same rows.
    """
    chosen = [layer.mask(num_rows) for layer in found]
    overlap = torch.ones(len(chosen), len(chosen))
    for i, first in enumerate(chosen):
        for j, second in enumerate(chosen[:i]):
            union_M = (first | second).sum(dim=1)
            common_M = (first & second).sum(dim=1)
            share_M = torch.where(union_M > 0, common_M / union_M.clamp_min(1), 1.0)
            overlap[i, j] = overlap[j, i] = share_M.mean()
    return overlap


def _equal(of_candidate_M: Tensor, of_row_N: Tensor) -> Tensor:
    same_MN = of_candidate_M[:, None] == of_row_N[None, :]
    return same_MN & (of_row_N != 0)


def _check_k(k: int) -> None:
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"a search finds at least 1 row per candidate, got k={k!r}")
