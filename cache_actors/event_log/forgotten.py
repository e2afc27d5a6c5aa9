"""Which users asked to be forgotten, and up to when: kept beside the segments, for good.

An erasure removes what the log holds. This list keeps away what comes later: an old event that a
client sends again, or a source that is ingested anew. It holds user ids and times, nothing else.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache_actors.atomic_files import sync_directory

FILE_NAME = "forgotten.txt"
"""One line per request: ``user_id until_ms;``. Only ever appended to."""

_LINE = re.compile(rb"(-?\d{1,19}) (-?\d{1,19});")
_INT64 = np.iinfo(np.int64)


@dataclass(frozen=True)
class _Listed:
    """What the file said when it had ``num_bytes``."""

    num_bytes: int
    user_ids: NDArray[np.int64]  # ascending
    until_ms: NDArray[np.int64]


class ForgottenUsers:
    """The list of the log under ``path``. Follows the file as other processes add to it; safe to
    use from threads."""

    def __init__(self, path: Path) -> None:
        self._file = Path(path) / FILE_NAME
        self._listed = _Listed(0, np.empty(0, np.int64), np.empty(0, np.int64))
        self._lock = threading.Lock()

    def until_ms_of(self) -> dict[int, int]:
        """Every forgotten user, with the time up to which events are forgotten."""
        listed = self._current()
        return dict(zip(listed.user_ids.tolist(), listed.until_ms.tolist(), strict=True))

    def covers(
        self, user_ids: NDArray[np.int64], timestamps_ms: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Which events are forgotten: their user is listed with their time or a later one."""
        listed = self._current()
        if not len(listed.user_ids):
            return np.zeros(len(user_ids), np.bool_)
        place = np.searchsorted(listed.user_ids, user_ids)
        place = np.minimum(place, len(listed.user_ids) - 1)
        found: NDArray[np.bool_] = listed.user_ids[place] == user_ids
        return found & (timestamps_ms <= listed.until_ms[place])

    def add(self, until_ms_of: Mapping[int, int]) -> None:
        """Note users for good; durable when it returns."""
        for user_id, until_ms in until_ms_of.items():
            if not all(_INT64.min <= number <= _INT64.max for number in (user_id, until_ms)):
                raise ValueError(
                    "a user id and a time in milliseconds must be integers of 64 bits, got user "
                    f"{user_id} until {until_ms}"
                )
        # Each line also begins anew, so one that a crash tore does not take the next with it.
        lines = "".join(f"\n{user} {until};\n" for user, until in until_ms_of.items())
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("ab") as file:
            file.write(lines.encode("ascii"))
            file.flush()
            os.fsync(file.fileno())
        sync_directory(self._file.parent)

    def _current(self) -> _Listed:
        try:
            num_bytes = self._file.stat().st_size
        except FileNotFoundError:
            num_bytes = 0
        if num_bytes != self._listed.num_bytes:
            with self._lock:
                content = self._file.read_bytes()
                until_ms_of = _parse(content, self._file)
                users = sorted(until_ms_of)
                until_ms = np.array([until_ms_of[user] for user in users], np.int64)
                self._listed = _Listed(len(content), np.array(users, np.int64), until_ms)
        return self._listed


def _parse(content: bytes, file: Path) -> dict[int, int]:
    until_ms_of: dict[int, int] = {}
    for line in content.split(b"\n"):
        if not line.endswith(b";"):  # nothing, or torn: whoever wrote it was told of no success
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(
                f"{file} must hold lines of a user id and a time in milliseconds, got {line!r}; "
                "restore the file, or remove that line"
            )
        user_id, until_ms = int(match[1]), int(match[2])
        until_ms_of[user_id] = max(until_ms, until_ms_of.get(user_id, until_ms))
    return until_ms_of
