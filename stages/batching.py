"""Requests of several users computed in turn, not beside each other: those that come while another
is computed, or within a short window.

No thread of its own: one of the threads that wait computes for all of them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from marm.items import ItemFeatures
from marm.memory import UserRows

logger = logging.getLogger("ray.serve")

MAX_WAITING = 64
"""More requests than this don't wait for one model; the replica's own queue is shorter."""


@dataclass(frozen=True)
class ScoreRequest:
    """One user's rows and candidates, as `ScoringModel.score` takes them."""

    rows: UserRows
    user_id: int
    candidates: ItemFeatures
    now_ms: int
    context_id: int


class ScoringModel(Protocol):
    """A model that scores all candidates of one user in one pass."""

    def score(
        self, rows: UserRows, user_id: int, candidates: ItemFeatures, now_ms: int, context_id: int
    ) -> NDArray[np.float32]:
        """Scores, ``[M]`` or ``[M, T]``."""
        ...


def score_one(model: ScoringModel, request: ScoreRequest) -> NDArray[np.float32]:
    """Scores of one request alone."""
    return model.score(
        request.rows, request.user_id, request.candidates, request.now_ms, request.context_id
    )


class NotScoredError(RuntimeError):
    """A request was given up before it was computed; the message says why."""


@dataclass
class _Ticket:
    """One request that waits, and what became of it."""

    request: ScoreRequest
    deadline_ms: float  # wall clock
    arrived_s: float  # monotonic clock
    scores: NDArray[np.float32] | None = None
    error: Exception | None = None

    @property
    def is_done(self) -> bool:
        return self.scores is not None or self.error is not None


@dataclass
class BatchCounts:
    """What a batcher has done so far."""

    batches: int = 0
    requests: int = 0
    given_up: int = 0


@dataclass
class ScoreBatcher:
    """Collects the requests to one loaded model. Call `score` from the threads of a replica.

    At most one batch is computed at a time, with all of torch's threads; what arrives meanwhile is
    the next batch. A request whose deadline passes while it waits is given up, and not computed.
    """

    model: ScoringModel
    max_waiting: int = MAX_WAITING
    counts: BatchCounts = field(default_factory=BatchCounts)
    _waiting: deque[_Ticket] = field(default_factory=deque)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _is_busy: bool = False

    def score(
        self, request: ScoreRequest, deadline_ms: float, window_ms: float, max_requests: int
    ) -> NDArray[np.float32]:
        """Scores of one request, computed with others that come within ``window_ms``.

        Raises:
            NotScoredError: its deadline (wall clock) passed, or too many requests wait.
        """
        ticket = _Ticket(request, deadline_ms, time.monotonic())
        with self._changed:
            if len(self._waiting) >= self.max_waiting:
                self.counts.given_up += 1
                raise NotScoredError(f"{len(self._waiting)} requests wait for this model already")
            self._waiting.append(ticket)
            self._changed.notify_all()
        while not ticket.is_done:
            if self._leads(ticket):
                self._compute(self._collect(window_ms / 1000, max_requests))
        if ticket.error is not None:
            raise ticket.error
        assert ticket.scores is not None
        return ticket.scores

    def _leads(self, ticket: _Ticket) -> bool:
        """Wait until the ticket is done, or until it is this thread's turn to compute a batch."""
        with self._changed:
            while self._is_busy and not ticket.is_done:
                left_s = ticket.deadline_ms / 1000 - time.time()
                if left_s <= 0 and ticket in self._waiting:
                    self._waiting.remove(ticket)
                    self._give_up(ticket)
                else:
                    self._changed.wait(max(left_s, 0.0) or None)
            if ticket.is_done:
                return False
            self._is_busy = True
            return True

    def _collect(self, window_s: float, max_requests: int) -> list[_Ticket]:
        """Wait for the window of the oldest request to close, then take a batch off the queue."""
        with self._changed:
            closes_s = self._waiting[0].arrived_s + window_s
            while len(self._waiting) < max_requests:
                left_s = closes_s - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
            num = min(max_requests, len(self._waiting))
            return [self._waiting.popleft() for _ in range(num)]

    def _compute(self, batch: Sequence[_Ticket]) -> None:
        """Fill in the tickets; whatever happens, somebody else may lead afterwards."""
        live = []
        for ticket in batch:
            if time.time() * 1000 > ticket.deadline_ms:
                self._give_up(ticket)
            else:
                live.append(ticket)
        try:
            self._score(live)
        finally:
            with self._changed:
                self._is_busy = False
                self.counts.batches += bool(live)
                self.counts.requests += len(live)
                self._changed.notify_all()

    def _score(self, tickets: list[_Ticket]) -> None:
        for ticket in tickets:
            try:
                ticket.scores = score_one(self.model, ticket.request)
            except Exception as error:  # raised again in the thread that asked
                ticket.scores, ticket.error = None, error

    def _give_up(self, ticket: _Ticket) -> None:
        ticket.error = NotScoredError("its time was over before it was computed")
        self.counts.given_up += 1
