"""API keys in front of routes: who is let in, and what the others are told."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from fastapi import HTTPException, Request

from app.api_keys import ApiKeys, KeyFileError, Role, StoredKey, find_key
from app.guards import RouteGuards

logger = logging.getLogger("ray.serve")

KEY_HEADER = "X-API-Key"
RELOAD_S = 1.0
"""How often a server looks at the file of keys: a revoked key works that much longer."""

MAX_KEY_CHARS = 200

GRANTED: dict[Role, tuple[Role, ...]] = {
    "feedback": ("feedback", "admin"),
    "admin": ("admin",),
    "test": ("test", "admin"),
}
"""Roles that open a route of a role."""


class LiveKeys:
    """The keys of a home, read again when their file has changed.

    A file that can't be understood changes nothing: keys that were good stay good, and the log says
    so. A file that is gone holds no keys.
    """

    def __init__(self, keys: ApiKeys, clock_s: Callable[[], float] = time.monotonic) -> None:
        """Raises:
        KeyFileError: the file is there and can't be understood.
        """
        self._keys = keys
        self._clock_s = clock_s
        self._state = self._look()
        self._stored = keys.read()
        self._looked_s = clock_s()

    def find(self, text: str) -> StoredKey | None:
        """The valid key that ``text`` is, if any."""
        self._reload()
        return find_key(self._stored, text)

    def _reload(self) -> None:
        now_s = self._clock_s()
        if now_s - self._looked_s < RELOAD_S:
            return
        self._looked_s = now_s
        state = self._look()
        if state == self._state:
            return
        self._state = state
        try:
            self._stored = self._keys.read()
        except KeyFileError as error:
            logger.error("%s; the keys known before stay valid", error)

    def _look(self) -> tuple[int, int, int]:
        try:
            found = self._keys.path.stat()
        except OSError:
            return (0, 0, 0)
        return (found.st_ino, found.st_size, found.st_mtime_ns)


class KnownCaller:
    """A `Guard` that asks for no key, but looks at one that comes: a request with a key that is not
    valid is a mistake, and answering it as anybody's would hide that."""

    def __init__(self, keys: LiveKeys) -> None:
        self._keys = keys

    async def __call__(self, request: Request) -> None:
        """Note the caller's role; an ``HTTPException`` of 401 for a key that is not valid."""
        if KEY_HEADER in request.headers:
            request.state.api_role = identify(request, self._keys).role


class KeyHolder:
    """A `Guard` that passes callers with a key of some roles."""

    def __init__(self, keys: LiveKeys, needed: Role) -> None:
        self._keys = keys
        self._roles = GRANTED[needed]

    async def __call__(self, request: Request) -> None:
        """Note the caller's role; an ``HTTPException`` of 401 without a valid key, of 403 with one
        of another role."""
        key = identify(request, self._keys)
        if key.role not in self._roles:
            raise HTTPException(
                403,
                f"API key {key.id} has the role {key.role!r}; this route needs "
                f"{' or '.join(repr(role) for role in self._roles)}",
            )
        request.state.api_role = key.role


def identify(request: Request, keys: LiveKeys) -> StoredKey:
    """The key of a request, or an ``HTTPException`` of 401."""
    given = request.headers.get(KEY_HEADER)
    if given is None:
        raise _unauthorized(f"this route needs an API key in the header {KEY_HEADER}")
    key = keys.find(given) if len(given) <= MAX_KEY_CHARS else None
    if key is None:
        raise _unauthorized(f"the API key in {KEY_HEADER} is not valid; `marm keys` makes one")
    return key


def caller_role(request: Request) -> Role | None:
    """The role of the caller's key; None for a caller without one."""
    role: Role | None = getattr(request.state, "api_role", None)
    return role


def key_guards(keys: LiveKeys, required: bool) -> RouteGuards:
    """Keys in front of the routes. Recommendations stay open: what they tell is what any user is
    shown. Feedback and administration need a key where keys are ``required``."""
    known = KnownCaller(keys)
    if not required:
        return RouteGuards(recommend=known, feedback=known, admin=known)
    return RouteGuards(known, KeyHolder(keys, "feedback"), KeyHolder(keys, "admin"))


def _unauthorized(error: str) -> HTTPException:
    return HTTPException(401, error, headers={"WWW-Authenticate": "ApiKey"})
