"""A lock on a store's directory: LMDB lets writers of several processes take turns, but each would
give out the same places of the row files."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from cache_actors.store.errors import StoreInUseError

_PATIENCE_S = 10.0
_POLL_S = 0.01


class WriterLock:
    """Held by the one writer of a store; the system gives it back when that process ends."""

    def __init__(self, path: Path) -> None:
        """Wait for a writer that is about to end; `StoreInUseError` if it does not."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    os.close(self._file)
                    raise StoreInUseError(
                        f"store {path.parent} has a writer already; a shard is written by one "
                        "process. Stop the other one, or use another directory"
                    ) from error
            time.sleep(_POLL_S)

    def release(self) -> None:
        """Let another writer open the store."""
        os.close(self._file)
