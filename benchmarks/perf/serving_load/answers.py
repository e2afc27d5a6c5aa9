"""What a load got for its requests, as columns, and the numbers that are asked of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

OK = 200
BUSY = (429, 503)
NO_ANSWER = 0
"""The status of a request whose connection failed or timed out."""
NO_VERSION = -1


@dataclass(frozen=True)
class Answer:
    """One request: when it was sent (monotonic clock, which all processes share), when its last
    byte was read, and what came."""

    began_s: float
    ended_s: float
    status: int
    is_degraded: bool = False
    version: int = NO_VERSION  # of the ranking model
    problem: str = ""
    retry_after_s: float = 0.0  # of a refusal


@dataclass(frozen=True)
class Answers:
    """All requests of a load, ``[R]`` each, in the order in which they ended."""

    began_s: NDArray[np.float64]
    ended_s: NDArray[np.float64]
    status: NDArray[np.int64]
    is_degraded: NDArray[np.bool_]
    version: NDArray[np.int64]
    problems: tuple[str, ...]  # distinct ones of requests that failed

    @staticmethod
    def of(answers: Sequence[Answer]) -> Answers:
        """As columns."""
        return Answers(
            np.array([answer.began_s for answer in answers], np.float64),
            np.array([answer.ended_s for answer in answers], np.float64),
            np.array([answer.status for answer in answers], np.int64),
            np.array([answer.is_degraded for answer in answers], np.bool_),
            np.array([answer.version for answer in answers], np.int64),
            tuple(sorted({answer.problem for answer in answers} - {""})),
        )

    def __len__(self) -> int:
        return len(self.status)

    @property
    def latency_s(self) -> NDArray[np.float64]:
        """Seconds from sending to the last byte, ``[R]``."""
        return self.ended_s - self.began_s

    @property
    def is_ok(self) -> NDArray[np.bool_]:
        """Which requests were answered, ``[R]``."""
        return self.status == OK

    @property
    def is_refused(self) -> NDArray[np.bool_]:
        """Which were told to come back later, ``[R]``."""
        return np.isin(self.status, BUSY)

    @property
    def is_failed(self) -> NDArray[np.bool_]:
        """Which got neither, ``[R]``."""
        return ~(self.is_ok | self.is_refused)

    def select(self, chosen: NDArray[np.bool_]) -> Answers:
        """Some of them."""
        return Answers(
            self.began_s[chosen],
            self.ended_s[chosen],
            self.status[chosen],
            self.is_degraded[chosen],
            self.version[chosen],
            self.problems,
        )

    def under_way_at(self, at_s: float) -> NDArray[np.bool_]:
        """Which were sent before a moment and answered after it, ``[R]``."""
        return (self.began_s <= at_s) & (self.ended_s >= at_s)

    def begun_in(self, from_s: float, to_s: float) -> Answers:
        """Those sent in ``[from_s, to_s)``."""
        return self.select((self.began_s >= from_s) & (self.began_s < to_s))

    def ok_per_s(self, from_s: float, to_s: float) -> float:
        """Answers per second that came in ``[from_s, to_s)``."""
        came = self.is_ok & (self.ended_s >= from_s) & (self.ended_s < to_s)
        return int(came.sum()) / (to_s - from_s)

    def latency_ms(self, quantile: float, chosen: NDArray[np.bool_] | None = None) -> float:
        """A quantile of the latency of the ``chosen`` requests (all); 0 of none."""
        latency_s = self.latency_s if chosen is None else self.latency_s[chosen]
        return 1_000 * float(np.quantile(latency_s, quantile)) if len(latency_s) else 0.0
