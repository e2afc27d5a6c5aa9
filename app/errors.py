"""Why the edge does not answer a request as asked; `app.api` says what each is over HTTP."""

from __future__ import annotations


class RefusedError(ValueError):
    """Well-formed input that this service does not accept; the message says why."""


class UnavailableError(RuntimeError):
    """The service cannot answer now; the message says what it waits for."""


class OverloadedError(RuntimeError):
    """The request could not have been answered in time; the message says what to do."""

    def __init__(self, message: str, retry_after_ms: float) -> None:
        """``retry_after_ms`` is when a request is likely to be taken."""
        super().__init__(message)
        self.retry_after_ms = retry_after_ms
