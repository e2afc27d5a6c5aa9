"""Each query's newest rows side by side, from stored rows and the batch's own events.

Shape legend: B queries, U users, N slab length, P block length, W columns of a window, K rows
taken of it, F feature dim, C columns of block and slab together, R rows of all users and the block.
A leading dim of 1 instead of B means that all queries share what is in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from marm.interest.interface import UNKNOWN_TAG, History


@dataclass(frozen=True)
class Window:
    """Rows that each query sees, newest first. A hidden column has keys of zero, no tag, and
    arbitrary distance and gap."""

    keys: Tensor  # [B or 1, W, F]
    visible: Tensor  # bool [B or 1, W]
    distance: Tensor  # int64 [B or 1, W], buckets
    gap: Tensor  # int64 [B or 1, W], buckets
    tag: Tensor | None  # int64 [B or 1, W]; None where items have none

    def newest(self, num_rows: int) -> Window:
        """The first ``num_rows`` columns, or all when there are fewer."""
        return Window(
            self.keys[:, :num_rows],
            self.visible[:, :num_rows],
            self.distance[:, :num_rows],
            self.gap[:, :num_rows],
            None if self.tag is None else self.tag[:, :num_rows],
        )

    def take(self, column_BK: Tensor, found_BK: Tensor) -> Window:
        """Columns that each query has picked; those that are not ``found`` are hidden."""
        keys_BKF = take_rows(self.keys, column_BK)
        return Window(
            keys_BKF,
            found_BK,
            _pick(self.distance, column_BK),
            _pick(self.gap, column_BK),
            None if self.tag is None else _pick(self.tag, column_BK),
        )


def gather_window(history: History, n: int, norm: nn.Module | None = None) -> Window:
    """The newest ``n`` rows of every query, newest first.

    ``norm`` maps rows to keys, each row once, before they are copied to queries; without it the
    features are the keys. ``W`` is the number of rows that the query with most rows sees, at least
    1 and at most ``n``. Events of the block count as newer than stored rows, and later ones in the
    batch as newer, which holds wherever a batch is in time order within a user. When the view has
    one line (the candidates of a request), so has the window, and nothing is copied per query.
    """
    slab, block = history.slab, history.block
    num_columns, num_block = slab.visible.shape[1], 0 if block is None else len(block.features)
    # A last column for what is not there, as a slab may have none at all.
    none_B1 = slab.distance.new_zeros(len(slab.distance), 1)
    visible_BC = slab.visible
    distances, gaps = [slab.distance, none_B1], [slab.gap, none_B1]
    rows = [slab.features.flatten(0, 1)]
    if block is not None:
        visible_BC = torch.cat([block.visible.flip(1), visible_BC], dim=1)
        distances.insert(0, block.distance)
        gaps.insert(0, block.gap)
        rows.insert(0, block.features)
    assert slab.user_row is not None, "a slab says whose each line of its view is"
    column_BW, visible_BW = first_columns(visible_BC, n)
    # The block was turned round to have its newest event first; turn back to where things are.
    in_block_BW = column_BW < num_block
    column_BW = torch.where(in_block_BW, num_block - 1 - column_BW, column_BW)
    row_BW = torch.where(in_block_BW, column_BW, column_BW + slab.user_row[:, None] * num_columns)
    feature_dim = slab.features.shape[-1]
    if norm is not None:
        rows = [norm(row) for row in rows]
    nothing = slab.features.new_zeros(1, feature_dim)
    rows_RF = torch.cat([*rows, nothing])
    row_BW = torch.where(visible_BW, row_BW, len(rows_RF) - 1)
    return Window(
        rows_RF.index_select(0, row_BW.flatten()).view(*row_BW.shape, feature_dim),
        visible_BW,
        torch.cat(distances, dim=1).gather(1, column_BW),
        torch.cat(gaps, dim=1).gather(1, column_BW),
        _tags_of(history, row_BW),
    )


def first_columns(marked_BC: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The first columns of each line that are marked: their numbers ``[B, W]`` and which of the W
    there are ``[B, W]``.

    W is the largest number of marks of a line, at least 1 and at most ``most``. A number that there
    is not is 0.
    """
    line, column = marked_BC.nonzero(as_tuple=True)
    counts_B = marked_BC.sum(dim=1)
    rank = torch.arange(len(line), device=line.device) - (counts_B.cumsum(0) - counts_B)[line]
    longest = int(counts_B.max()) if len(counts_B) else 0
    width = max(1, min(longest, most))
    if longest > most:
        kept = rank < most
        line, column, rank = line[kept], column[kept], rank[kept]
    column_BW = column.new_zeros(len(marked_BC), width)
    column_BW[line, rank] = column
    places = torch.arange(width, device=line.device)
    return column_BW, places < counts_B[:, None]


def take_rows(x_BWF: Tensor, column_BK: Tensor) -> Tensor:
    """``[B, K, F]``: rows that each query picks, where the queries may share them."""
    num_lines, width, dim = x_BWF.shape
    # Whole rows by index_select: its backward adds whole rows too, unlike that of gather.
    row_BK = column_BK
    if num_lines > 1:
        row_BK = column_BK + width * torch.arange(num_lines, device=column_BK.device)[:, None]
    return x_BWF.flatten(0, 1).index_select(0, row_BK.flatten()).view(*column_BK.shape, dim)


def _pick(x_BW: Tensor, column_BK: Tensor) -> Tensor:
    return x_BW.expand(len(column_BK), -1).gather(1, column_BK)


def _tags_of(history: History, row_BW: Tensor) -> Tensor | None:
    """Tags of rows that are numbered as `gather_window` does; the row after the last has none."""
    tags = history.tags
    if tags is None:
        return None
    parts = [tags.slab_UN.flatten(), tags.slab_UN.new_full((1,), UNKNOWN_TAG)]
    if tags.block_P is not None:
        parts.insert(0, tags.block_P)
    return functional.embedding(row_BW, torch.cat(parts)[:, None])[..., 0]
