"""Who may call a route: the places where checks of a caller hang."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import Request

Guard = Callable[[Request], Awaitable[None] | None]
"""Passes a request, or raises an ``HTTPException`` of 401 or 403."""


async def anyone(request: Request) -> None:
    """Passes every caller."""


@dataclass(frozen=True)
class RouteGuards:
    """The check in front of each kind of route."""

    recommend: Guard = anyone
    feedback: Guard = anyone
    admin: Guard = anyone
