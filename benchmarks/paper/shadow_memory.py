"""Memories beside that of a pass, read and written by the same weights, which learn nothing here.

What the loop does with its memory is done with each of them at every step: fetch, predict, save. So
their predictions differ from those of the pass by the memory alone, and a copy of its memory gives
its very predictions.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from benchmarks.paper.watched_pass import Piece, WatchedScores, ask
from cache_actors.store.row_formats import as_read
from marm.memory import Memory
from marm.sequence import enters_sequence, raw_rows


class ShadowMemories:
    """Predicts every piece with each of some memories, by name."""

    def __init__(self, memories: Mapping[str, Memory]) -> None:
        self._memories = memories
        self.scores = WatchedScores()

    def watch(self, piece: Piece) -> None:
        """See `benchmarks.paper.watched_pass.Watch`."""
        users, position = np.unique(piece.events.user_id, return_inverse=True)
        before_ms = np.full(len(users), np.iinfo(np.int64).max)
        np.minimum.at(before_ms, position, piece.events.timestamp_ms)
        for name, memory in self._memories.items():
            before = memory.fetch(users, piece.model.config.history_length, before_ms)
            answer = ask(piece.model, piece.model.inputs.for_training(piece.events, before))
            self.scores.add(name, piece, answer.score_B)
            rows = raw_rows(piece.events, memory.namespace.row_dtype)
            rows["memory"], rows["written_step"] = answer.rows_BLD, piece.step
            keep = enters_sequence(piece.events, memory.namespace.sequence)
            read = as_read(memory.namespace, rows[keep])
            memory.save(piece.events.user_id[keep], read)
