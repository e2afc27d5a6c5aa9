"""What became of a request, for those who count."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from app.errors import OverloadedError, RefusedError, UnavailableError

Route = Literal["recommend", "feedback"]
RequestOutcome = Literal[
    "ok", "degraded", "overloaded", "refused", "unavailable", "cancelled", "failed"
]

OnOutcome = Callable[[Route, RequestOutcome, float], None]
"""Told of every request: its route, what became of it and the ms that it took."""


def nobody_counts(route: Route, outcome: RequestOutcome, ms: float) -> None:
    """An `OnOutcome` that does nothing."""


@dataclass
class CountedRequest:
    """One request in work; ``outcome`` is what it will be counted as when nothing goes wrong."""

    outcome: RequestOutcome = "ok"


@contextmanager
def counted(route: Route, on_outcome: OnOutcome) -> Iterator[CountedRequest]:
    """Tell ``on_outcome`` what became of the request that is answered inside."""
    started_s = time.perf_counter()
    request = CountedRequest()
    try:
        yield request
    except BaseException as error:
        request.outcome = outcome_of(error)
        raise
    finally:
        on_outcome(route, request.outcome, (time.perf_counter() - started_s) * 1000)


def outcome_of(error: BaseException) -> RequestOutcome:
    """How a request counts that ended in ``error``."""
    if isinstance(error, OverloadedError):
        return "overloaded"
    if isinstance(error, UnavailableError):
        return "unavailable"
    if isinstance(error, (RefusedError, PermissionError)):
        return "refused"
    return "cancelled" if isinstance(error, asyncio.CancelledError) else "failed"
