"""What a model predicts when the memory is behind: the newest rows have no vectors yet.

That is how a served model meets an old memory. Feedback stores a raw row at once, so every query
sees all events before it; vectors follow when training has come that far. With a lag of A events
the rows of the stream's newest A events are raw, which the layers above 0 mask, and older ones have
the vectors that training wrote. Weights don't lag: a prediction is made with those that make the
test-then-train prediction of the event, so that the difference is the memory's alone.

Shape legend: B events of a piece.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.paper.watched_pass import Piece, WatchedScores, ask
from marm.events import EventBatch
from marm.memory import RAW_STEP, DoneAck, Memory, UserRows
from marm.sequence import enters_sequence, raw_rows
from train.overlay import Overlay, PendingSave

NO_VECTORS = "none"
"""The name of a memory in which no row has vectors."""


class LaggingMemory:
    """Asks the model of every piece with memories that lag by different numbers of events.

    Args:
        memory: of the pass; only read.
        timestamp_ms: of all events of the stream.
        lags: A of each memory. The events of a piece are raw for one another, so a lag is at
            least a piece, and up to a piece longer than it says.
    """

    def __init__(
        self, memory: Memory, timestamp_ms: NDArray[np.int64], lags: Sequence[int]
    ) -> None:
        if any(lag < 1 for lag in lags):
            raise ValueError(f"a lag is at least 1 event, got {list(lags)}")
        self._memory, self._timestamp_ms, self._lags = memory, timestamp_ms, lags
        self.scores = WatchedScores()

    def watch(self, piece: Piece) -> None:
        """See `benchmarks.paper.watched_pass.Watch`."""
        rows = self._rows_before(piece.events, piece.model.config.history_length)
        for lag in self._lags:
            self._ask(str(lag), piece, without_vectors(rows, self._raw_from_ms(piece.start, lag)))
        self._ask(NO_VECTORS, piece, without_vectors(rows, np.iinfo(np.int64).min))

    def _ask(self, name: str, piece: Piece, rows: UserRows) -> None:
        inputs = piece.model.inputs.for_reading(piece.events, rows)
        self.scores.add(name, piece, ask(piece.model, inputs).score_B)

    def _raw_from_ms(self, start: int, lag: int) -> int:
        """The time from which rows are raw when the stream is at ``start``."""
        return int(self._timestamp_ms[max(0, start - lag)])

    def _rows_before(self, events: EventBatch, n: int) -> UserRows:
        """Rows from before each user's last event of the piece, enough for all of his events; those
        of the piece itself are raw."""
        users, position, counts = np.unique(events.user_id, return_inverse=True, return_counts=True)
        before_ms = np.full(len(users), np.iinfo(np.int64).min)
        np.maximum.at(before_ms, position, events.timestamp_ms)
        enough = n + int(counts.max(initial=0))
        namespace = self._memory.namespace
        own = events.take(enters_sequence(events, namespace.sequence))
        overlay = Overlay()
        overlay.add(PendingSave(own.user_id, raw_rows(own, namespace.row_dtype), DoneAck()))
        return overlay.merge(self._memory.fetch(users, enough, before_ms), enough, before_ms)


def without_vectors(rows: UserRows, from_ms: int) -> UserRows:
    """The same rows, raw from the time ``from_ms`` on."""
    changed = rows.rows.copy()
    newer = changed["timestamp_ms"] >= from_ms
    changed["written_step"][newer] = RAW_STEP
    changed["memory"][newer] = 0
    return UserRows(rows.user_ids, rows.offsets, changed)
