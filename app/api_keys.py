"""API keys: made once, shown once, stored as hashes in one file of the home.

A key is ``marm_<id>_<secret>``: the id names it in lists and logs, the secret has 256 random bits.
The file holds SHA-256 of the whole key. That is enough for a secret nobody can guess or look up; a
slow hash is for passwords, which people choose, and would cost every request milliseconds.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal, get_args

from pydantic import Field, TypeAdapter, ValidationError

from app.strict import Strict
from cache_actors.atomic_files import replace_text
from cache_actors.home import Home

Role = Literal["feedback", "admin", "test"]
ROLES: tuple[Role, ...] = get_args(Role)

KEYS_FILE = "api_keys.json"
_LOCK_FILE = ".api_keys.lock"
_SECRET_BYTES = 32
_KEY = re.compile(r"marm_([0-9a-f]{8})_[A-Za-z0-9_-]{43}")


class KeyFileError(RuntimeError):
    """The file of keys can't be read; the message says what to do."""


class StoredKey(Strict):
    """What is kept of a key: enough to recognise it, not enough to make it."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
    role: Role
    note: Annotated[str, Field(max_length=200)] = ""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created_ms: Annotated[int, Field(ge=0)]


_STORED = TypeAdapter(tuple[StoredKey, ...])


class ApiKeys:
    """The keys of a home. Safe to use from several processes."""

    def __init__(self, home: Home) -> None:
        self._home = home.path
        self.path = home.path / KEYS_FILE

    def create(self, role: Role, note: str = "") -> tuple[str, StoredKey]:
        """A new key, and what is kept of it; nobody can read the key again."""
        with self._locked():
            known = self.read()
            ids = {key.id for key in known}
            key_id = secrets.token_hex(4)
            while key_id in ids:
                key_id = secrets.token_hex(4)
            text = f"marm_{key_id}_{secrets.token_urlsafe(_SECRET_BYTES)}"
            stored = StoredKey(
                id=key_id,
                role=role,
                note=note,
                sha256=_digest(text),
                created_ms=time.time_ns() // 1_000_000,
            )
            self._write((*known, stored))
        return text, stored

    def revoke(self, key_id: str) -> StoredKey:
        """Forget a key; servers refuse it from their next look at the file on.

        Raises:
            ValueError: there is no such key.
        """
        with self._locked():
            known = self.read()
            found = [key for key in known if key.id == key_id]
            if not found:
                raise ValueError(
                    f"there is no API key {key_id!r} in {self.path}; `marm keys list` shows all"
                )
            self._write(tuple(key for key in known if key.id != key_id))
        return found[0]

    def read(self) -> tuple[StoredKey, ...]:
        """All keys, oldest first; none when there is no file.

        Raises:
            KeyFileError: the file is there and can't be understood.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise KeyFileError(f"cannot read {self.path}: {error.strerror}") from error
        try:
            return _STORED.validate_json(content)
        except ValidationError as error:
            raise KeyFileError(
                f"{self.path} is not a list of API keys ({error.error_count()} problems); bring it "
                "back from a copy, or delete it and make new keys with `marm keys create`"
            ) from error

    def _write(self, keys: tuple[StoredKey, ...]) -> None:
        entries = [key.model_dump() for key in keys]
        replace_text(self.path, json.dumps(entries, indent=1) + "\n")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if not self._home.is_dir():
            raise ValueError(f"there is no home at {self._home}; give --home the one that serves")
        descriptor = os.open(self._home / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        previous = os.umask(0o077)  # the file is for its owner alone
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.umask(previous)
            os.close(descriptor)


def key_id_of(text: str) -> str | None:
    """The id in a key that is written correctly, else None."""
    match = _KEY.fullmatch(text)
    return match[1] if match else None


def find_key(keys: tuple[StoredKey, ...], text: str) -> StoredKey | None:
    """The key that ``text`` is, if any. Takes as long for a wrong secret as for a right one."""
    key_id = key_id_of(text)
    digest = _digest(text)
    for key in keys:
        if key.id == key_id and hmac.compare_digest(key.sha256, digest):
            return key
    return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
