"""Files that appear whole or not at all, also after a crash of the writer or of the machine."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import uuid
from pathlib import Path

PENDING_PREFIX = ".pending-"
"""Names under which unfinished work lives; readers never look at them."""

_ALREADY_THERE = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


def pending_path(directory: Path) -> Path:
    """A fresh name in ``directory`` for something that is still being written."""
    return directory / f"{PENDING_PREFIX}{uuid.uuid4().hex}"


def sync_directory(directory: Path) -> None:
    """Make the names in ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the content of a file that was just written durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def claim_file(pending: Path, target: Path) -> bool:
    """Give ``pending`` the name ``target`` unless that name is taken; false when it is.

    A hard link fails where a rename would silently replace what another writer committed.
    """
    try:
        os.link(pending, target)
    except FileExistsError:
        return False
    pending.unlink()
    sync_directory(target.parent)
    return True


def claim_directory(pending: Path, target: Path) -> bool:
    """Give the non-empty directory ``pending`` the name ``target``; false when it is taken.

    Renaming a directory onto a file or onto a non-empty directory fails, so nothing is replaced.
    """
    try:
        pending.rename(target)
    except OSError as error:
        if error.errno in _ALREADY_THERE:
            return False
        raise
    sync_directory(target.parent)
    return True


def replace_text(path: Path, text: str) -> None:
    """Set the content of ``path``; readers see the old text or the new, nothing between."""
    pending = pending_path(path.parent)
    try:
        with pending.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        pending.replace(path)
    finally:
        pending.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_hint(path: Path, text: str) -> None:
    """Like `replace_text` for what may be lost: cheap, not durable, and never fails."""
    pending = pending_path(path.parent)
    with contextlib.suppress(OSError):
        pending.write_text(text, encoding="utf-8")
        pending.replace(path)
    with contextlib.suppress(OSError):
        pending.unlink(missing_ok=True)


def remove_abandoned(directory: Path, older_than_s: float = 3600.0) -> list[str]:
    """Delete unfinished work that nobody has touched for a while; the names removed."""
    removed: list[str] = []
    for path in directory.glob(f"{PENDING_PREFIX}*"):
        try:
            if time.time() - path.stat().st_mtime < older_than_s:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        except FileNotFoundError:  # another process tidied up or finished it meanwhile
            continue
        removed.append(path.name)
    return removed
