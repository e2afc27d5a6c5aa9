"""Refuses bodies that are too large before anything parses them."""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware: reads a body of at most ``max_bytes`` and hands it on, else answers 413."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if declared_length(scope) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        body = bytearray()  # joined: a million messages of a byte each would take far more
        while True:
            last = await receive()
            if last["type"] != "http.request":
                break
            body += last.get("body", b"")
            if len(body) > self._max_bytes:
                await self._refuse(scope, receive, send)
                return
            if not last.get("more_body", False):
                break
        whole: Message = {"type": "http.request", "body": bytes(body), "more_body": False}
        messages = [whole] if last["type"] == "http.request" else [last]

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replay, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = f"the body must be at most {self._max_bytes} bytes; send fewer events at once"
        response = JSONResponse({"error": error, "details": []}, status_code=413)
        await response(scope, receive, send)


def declared_length(scope: Scope) -> int:
    """The request's Content-Length; 0 when it is not given or not a number."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0
