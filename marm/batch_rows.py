"""How a batch's own events lie as keys: all before every query, or beside those of their user.

A query sees the earlier events of its own user only. `WholeBlock` shows it the whole batch and
hides the rest: attention then costs B * B, however few events a user has. `BlockByUser` lays them
out as a slab of each user, B * Q. Both give the same numbers; the first is the plain form and the
reference, and the better one where few users have most of a batch.

Shape legend: B queries, which are the block's P events, U users, Q most events of one user, F
feature dim, X width of anything that an event has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from marm.query_groups import by_user

_COPY_COST = 10
"""Attention to an event of one's user, copied beside him, in attention to one of the whole batch;
measured with `benchmarks.perf.batch_rows`."""


@dataclass(frozen=True)
class KeySource:
    """Live features of one set of keys, before a layer adds its cached vectors."""

    features: Tensor  # [U, N, F] or [P, F]
    visible: Tensor  # bool [B or 1, N or P]
    distance: Tensor  # int64, buckets
    gap: Tensor  # int64, buckets
    user_row: Tensor | None


class BatchRows(Protocol):
    """The batch's own events as one set of keys."""

    @property
    def source(self) -> KeySource:
        """Their live features and what each query sees of them."""
        ...

    def rows(self, x_PX: Tensor) -> Tensor:
        """What the events have, laid out as the features of `source`."""
        ...


@dataclass(frozen=True)
class WholeBlock:
    """Every query before all of the batch's events, ``[P, F]``."""

    source: KeySource

    def rows(self, x_PX: Tensor) -> Tensor:
        """See `BatchRows.rows`."""
        return x_PX


@dataclass(frozen=True)
class BlockByUser:
    """Every query before the batch's events of its user, ``[U, Q, F]`` in the batch's order."""

    source: KeySource
    event_UQ: Tensor  # int64 index among the batch's events; P where a user has no more

    @staticmethod
    def of(block: KeySource, user_row_B: Tensor) -> BlockByUser:
        """``user_row_B`` is the user of each event; every one of ``max + 1`` users has a slab."""
        num_events, counts_U = len(user_row_B), torch.bincount(user_row_B)
        order_B, ordinal_B = by_user(user_row_B, counts_U)
        event_UQ = order_B.new_full((len(counts_U), int(counts_U.max())), num_events)
        event_UQ[user_row_B[order_B], ordinal_B] = order_B
        event_BQ = event_UQ[user_row_B]
        missing_BQ = event_BQ == num_events
        # Any event stands in for one that a user does not have: nobody sees it.
        place_BQ = event_BQ.masked_fill(missing_BQ, 0)
        source = KeySource(
            _rows(block.features, event_UQ),
            block.visible.gather(1, place_BQ) & ~missing_BQ,
            block.distance.gather(1, place_BQ),
            block.gap.gather(1, place_BQ),
            user_row_B,
        )
        return BlockByUser(source, event_UQ)

    def rows(self, x_PX: Tensor) -> Tensor:
        """See `BatchRows.rows`; zeros where a user has no more."""
        return _rows(x_PX, self.event_UQ)


def batch_rows(block: KeySource, user_row_B: Tensor | None) -> BatchRows:
    """The layout that costs less; ``user_row_B`` is the user of each event.

    By user a query passes Q rows that were copied for its user, in whole it passes B.
    """
    if user_row_B is None or not len(user_row_B):
        return WholeBlock(block)
    most = int(torch.bincount(user_row_B).max())
    if _COPY_COST * most > len(user_row_B):
        return WholeBlock(block)
    return BlockByUser.of(block, user_row_B)


def _rows(x_PX: Tensor, event_UQ: Tensor) -> Tensor:
    padded = torch.cat([x_PX, x_PX.new_zeros(1, x_PX.shape[1])])
    return nn.functional.embedding(event_UQ, padded, padding_idx=len(x_PX))
