"""Rows from histories with frozen weights, through the causal block that training uses.

Training fetches a slab per user and adds the batch's own events as a block. Here whole histories
are at hand, so the block does nearly all the work: a block holds either the whole histories of
several users, who need no slab at all, or a piece of one user's, whose slab is the end of the piece
before. Rows equal what streaming with these weights writes, to rounding (`tests/unit/train`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from marm.memory import UserRows
from marm.ranker import Ranker
from marm.sequence import raw_rows
from train.rebuild.histories import Histories

BLOCK_EVENTS = 256
"""Events per forward pass: enough to amortise its overhead, few enough that attending to the
other users of the block, all masked, stays cheap."""


@dataclass(frozen=True)
class Block:
    """Events ``start`` to ``end`` of some histories, computed in one pass.

    ``continues`` says that it is a piece of one user's history that an earlier block began.
    """

    start: int
    end: int
    continues: bool


def cut_blocks(histories: Histories, block_events: int) -> Iterator[Block]:
    """Blocks of about ``block_events`` events that cover ``histories`` in order."""
    start = 0
    for first, end in zip(
        histories.offsets[:-1].tolist(), histories.offsets[1:].tolist(), strict=True
    ):
        if end - start <= block_events:
            continue  # fits beside the users before it
        if first > start:
            yield Block(start, first, False)
            start = first
        if end - first > block_events:
            yield from _pieces(histories.events.timestamp_ms, first, end, block_events)
            start = end
    if start < int(histories.offsets[-1]):
        yield Block(start, int(histories.offsets[-1]), False)


def _pieces(
    timestamp_ms: NDArray[np.int64], first: int, end: int, block_events: int
) -> Iterator[Block]:
    """Pieces of one history. Simultaneous events stay together: neither is the other's history, so
    neither may be in the other's slab."""
    start = first
    while start < end:
        cut = min(start + block_events, end)
        if cut < end:
            tie = timestamp_ms[start:end] == timestamp_ms[cut]
            before = start + int(np.argmax(tie))
            cut = before if before > start else start + int(np.count_nonzero(tie))
        yield Block(start, cut, start > first)
        start = cut


class RowComputer:
    """Computes rows as version ``step`` of a model would write them at ``written_s``."""

    def __init__(
        self, model: Ranker, step: int, written_s: int, block_events: int = BLOCK_EVENTS
    ) -> None:
        self._model, self._step, self._written_s = model, step, written_s
        self._block_events = block_events
        self._history_length = model.config.history_length
        self._row_dtype = model.config.namespace.row_dtype

    def rows(self, histories: Histories) -> Iterator[tuple[Block, NDArray[np.void]]]:
        """Block by block, the rows of its events in the order of ``histories``."""
        slab = np.empty(0, self._row_dtype)
        for block in cut_blocks(histories, self._block_events):
            if not block.continues:
                slab = slab[:0]
            rows = self._compute(histories, block, slab)
            yield block, rows
            slab = np.concatenate([slab, rows])[-self._history_length :]

    @torch.inference_mode()
    def _compute(
        self, histories: Histories, block: Block, slab: NDArray[np.void]
    ) -> NDArray[np.void]:
        events = histories.events.take(slice(block.start, block.end))
        user_ids = np.unique(events.user_id)
        offsets = np.zeros(len(user_ids) + 1, np.int64)
        offsets[1:] = len(slab)  # a slab belongs to the only user of its block
        inputs = self._model.inputs.for_training(events, UserRows(user_ids, offsets, slab))
        prior = self._model.item_prior(self._model.item_slots(inputs))
        memory_BLD = self._model.net(self._model.embed(inputs), prior).rows_BLD
        rows = raw_rows(events, self._row_dtype)
        rows["memory"] = memory_BLD.float().cpu().numpy()
        rows["written_step"] = self._step
        rows["written_s"] = self._written_s
        return rows
