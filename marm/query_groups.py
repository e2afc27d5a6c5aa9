"""Queries of one user side by side, so that one product per user serves all of them.

Shape legend: B queries, U users, G groups, Q places of a group, N rows of a user.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_MOST_PADDING = 8
"""Places per query that are given before users with many queries get several groups."""


@dataclass(frozen=True)
class QueryGroups:
    """Where each query stands among ``G`` groups of ``Q`` places; a group is of one user.

    A user has one group, unless few users have most of the queries: then they have several, and
    their rows are copied.
    """

    size: int  # Q
    user_G: Tensor | None  # int64 user of each group; None: group g is of user g
    place_B: Tensor  # int64 in [0, G * Q)
    query_P: Tensor  # int64 [G * Q] the query at each place; B where there is none

    @staticmethod
    def of(user_row_B: Tensor, num_users: int) -> QueryGroups:
        """Groups of the queries of ``num_users`` users; ``user_row_B`` says whose each is."""
        num_queries, device = len(user_row_B), user_row_B.device
        counts_U = torch.bincount(user_row_B, minlength=num_users)
        most = int(counts_U.max()) if num_queries else 1
        size, user_G = most, None
        groups_U = torch.ones_like(counts_U)
        if num_queries and most * num_users > _MOST_PADDING * num_queries:
            size = -(-2 * num_queries // num_users)
            groups_U = (counts_U + size - 1).div(size, rounding_mode="floor")
            user_G = torch.repeat_interleave(groups_U)
        order_B, ordinal_B = by_user(user_row_B, counts_U)
        place_B = torch.empty_like(order_B)
        # The groups of a user follow one another, so his places are consecutive.
        place_B[order_B] = _starts(groups_U)[user_row_B[order_B]] * size + ordinal_B
        num_places = size * (num_users if user_G is None else len(user_G))
        query_P = torch.full((num_places,), num_queries, device=device)
        query_P[place_B] = torch.arange(num_queries, device=device)
        return QueryGroups(size, user_G, place_B, query_P)

    def rows(self, x_UNC: Tensor) -> Tensor:
        """Rows of the user of each group, ``[G, N, C]``."""
        if self.user_G is None:
            return x_UNC
        return slabs_of(x_UNC, self.user_G)

    def gather(self, x_BHX: Tensor) -> Tensor:
        """What each place has of its query, ``[G, Q * H, X]``; zeros where there is none."""
        _, num_heads, width = x_BHX.shape
        padded = torch.cat([x_BHX.flatten(1), x_BHX.new_zeros(1, num_heads * width)])
        places = nn.functional.embedding(self.query_P, padded)
        return places.view(-1, self.size * num_heads, width)

    def scatter(self, x_GPX: Tensor, num_heads: int) -> Tensor:
        """Back from `gather`: ``[B, H, X]``."""
        places = x_GPX.reshape(-1, num_heads * x_GPX.shape[2])
        taken = nn.functional.embedding(self.place_B, places)
        return taken.view(len(self.place_B), num_heads, x_GPX.shape[2])


def by_user(user_row_B: Tensor, counts_U: Tensor) -> tuple[Tensor, Tensor]:
    """Queries user by user in their order, and how many of its user come before each of them;
    ``counts_U`` is the number that each user has."""
    order_B = torch.argsort(user_row_B, stable=True)
    number_B = torch.arange(len(order_B), device=order_B.device)
    return order_B, number_B - _starts(counts_U)[user_row_B[order_B]]


def slabs_of(x_UNX: Tensor, user_row: Tensor) -> Tensor:
    """The slab ``[U, N, ...]`` of each user asked for."""
    # An embedding look-up of whole slabs: its backward adds wide rows, which on a CPU is several
    # times faster than the scatter that index_select and advanced indexing use.
    wide = nn.functional.embedding(user_row, x_UNX.flatten(1))
    return wide.view(len(user_row), *x_UNX.shape[1:])


def _starts(counts: Tensor) -> Tensor:
    return torch.cumsum(counts, dim=0) - counts
