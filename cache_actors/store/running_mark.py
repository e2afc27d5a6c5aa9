"""A mark in a store's directory: rows were saved that may not have reached the disk.

Without syncing every commit, the death of processes costs nothing: the kernel holds what they
wrote. When the machine itself goes down, some pages reached the disk and some did not, and a file
of both must not be trusted. The mark names the boot in which it was set, so that the next one
knows.
"""

from __future__ import annotations

import os
from pathlib import Path

from cache_actors.atomic_files import sync_directory

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """The machine's present boot; empty where the system does not tell."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


class RunningMark:
    """The mark of one store."""

    def __init__(self, path: Path, is_needed: bool) -> None:
        self._path = path
        self._is_needed = is_needed
        self._is_set = False

    def is_of_earlier_boot(self) -> bool:
        """Whether the machine went down while the mark was set."""
        try:
            return self._path.read_bytes().strip() != boot_id().encode()
        except FileNotFoundError:
            return False

    def set(self) -> None:
        """Something is about to be written."""
        if self._is_needed and not self._is_set:
            with self._path.open("w", encoding="ascii") as file:
                file.write(boot_id())
                file.flush()
                os.fsync(file.fileno())  # it must be there before anything that it warns of
            sync_directory(self._path.parent)
            self._is_set = True

    def clear(self) -> None:
        """Everything saved so far is on the disk."""
        if self._path.exists():
            self._path.unlink()
            sync_directory(self._path.parent)
        self._is_set = False
