"""Refuses requests before anything is parsed, so that a refusal costs next to nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import OverloadedError
from app.schemas import Problem

Refusal = Callable[[], OverloadedError | None]
"""Why a request that comes now is not let in; None when it is."""


class AdmissionGate:
    """ASGI middleware: answers refused requests to some paths itself, and hands the rest on."""

    def __init__(self, app: ASGIApp, refusals: Mapping[str, Refusal], status: int) -> None:
        """``refusals`` by path; ``status`` is 429 or 503."""
        self._app = app
        self._refusals = refusals
        self._status = status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on."""
        refusal = self._refusals.get(scope["path"]) if scope["type"] == "http" else None
        error = None if refusal is None else refusal()
        if error is None:
            await self._app(scope, receive, send)
            return
        body = json.dumps(Problem(error=str(error)).model_dump()).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **retry_headers(error),
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": self._status, "headers": raw})
        await send({"type": "http.response.body", "body": body})


def retry_headers(error: OverloadedError) -> dict[str, str]:
    """When to try again: in whole seconds, as HTTP has it, and in milliseconds."""
    return {
        "retry-after": str(math.ceil(error.retry_after_ms / 1000)),
        "retry-after-ms": str(math.ceil(error.retry_after_ms)),
    }
