"""The keys that a layer attends to once it has searched, in training (Eq. 9).

Scores come first and need no gradient: the mean over heads of a row's content and recency bias, as
`marm.search` has it. Then the attention goes over what was found: rows found are copied side by
side for each query, or, where that would cost more, rows that were not found are hidden.

Shape legend: B queries, U users, N rows of a key set, K rows found, H heads, E head width, D = H*E.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from marm.key_reading import Keys, RowPart, read_keys
from marm.search import Found, RowSearch

COPY_COST = 2
"""Attention to a row that was copied for its query, in attention to a row where it is."""

_NOT_FOUND = float("-inf")


def found_keys(
    search: RowSearch, q_BHE: Tensor, key_value: nn.Linear, key_sets: list[Keys]
) -> list[Keys]:
    """The same sets with the rows that ``search`` finds among all of them, for each query."""
    widths = [keys.visible.shape[1] for keys in key_sets]
    if search.takes_all(sum(widths)):
        return key_sets
    found = search.find(scores_of_rows(q_BHE, key_value, key_sets), None)
    narrowed, start = [], 0
    for keys, width in zip(key_sets, widths, strict=True):
        of_set = _within(found, start, width)
        narrowed.append(
            copied_keys(keys, of_set) if _copies(keys, of_set) else hidden_keys(keys, of_set)
        )
        start += width
    return narrowed


@torch.no_grad()
def scores_of_rows(q_BHE: Tensor, key_value: nn.Linear, key_sets: list[Keys]) -> Tensor:
    """What the search goes by, for the rows of all sets side by side; -inf for hidden rows."""
    # The mean over heads of the products of their parts is one product of the whole width.
    mean_B1D = q_BHE.flatten(1).unsqueeze(1) / q_BHE.shape[1]
    scores = []
    for keys in key_sets:
        content_BN = read_keys(mean_B1D, keys.inputs, key_value, keys.user_row).content()[:, 0]
        biased_BN = content_BN + keys.bias.mean(dim=1)
        scores.append(torch.where(keys.visible, biased_BN, _NOT_FOUND))
    return torch.cat(scores, dim=1)


def hidden_keys(keys: Keys, found: Found) -> Keys:
    """``keys`` of which a query sees only those found."""
    # Where fewer are visible than are looked for, hidden ones are found too.
    return replace(keys, visible=keys.visible & found.mask(keys.visible.shape[1]))


def copied_keys(keys: Keys, found: Found) -> Keys:
    """The rows found as a slab ``[B, K]`` of each query's own."""
    position_BK, valid_BK = found.position, found.valid
    num_queries, num_found = position_BK.shape
    assert keys.user_row is not None
    row_BK = position_BK + keys.user_row[:, None] * keys.visible.shape[1]
    parts = tuple(
        RowPart(nn.functional.embedding(row_BK, part.values.flatten(0, 1)), part.norm)
        for part in keys.parts
    )
    num_heads = keys.bias.shape[1]
    place_BHK = position_BK.unsqueeze(1).expand(-1, num_heads, num_found)
    bias_BHN = keys.bias.expand(num_queries, -1, -1)
    visible_BN = keys.visible.expand(num_queries, -1)
    return Keys(
        parts,
        visible_BN.gather(1, position_BK) & valid_BK,
        bias_BHN.gather(2, place_BHK),
        torch.arange(num_queries, device=position_BK.device),
    )


def _copies(keys: Keys, found: Found) -> bool:
    """Whether copying rows is cheaper: not where all queries share them, nor for nearly all."""
    num_queries, num_found = found.position.shape
    shared = keys.user_row is None or len(keys.parts[0].values) < 2 or num_queries < 2
    return not shared and COPY_COST * num_found <= keys.visible.shape[1]


def _within(found: Found, start: int, width: int) -> Found:
    """What was found in one of several sets, as positions in it."""
    position = found.position - start
    inside = (position >= 0) & (position < width)
    return Found(torch.where(inside, position, 0), found.valid & inside)
