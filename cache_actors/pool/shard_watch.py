"""Looking after the shards of a client from a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import ray

from cache_actors.pool.errors import MemoryUnavailable

logger = logging.getLogger(__name__)


class ShardWatch:
    """Calls ``look`` from time to time. It must outlive whatever one look runs into."""

    def __init__(self, look: Callable[[], None], interval_s: float) -> None:
        self._look = look
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-shard-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        # Ray would start a cluster of its own if it were called after a shutdown.
        while not self._stop.wait(self._interval_s) and ray.is_initialized():
            try:
                self._look()
            except MemoryUnavailable as error:
                logger.debug("%s", error)
            except Exception:
                logger.warning("could not look after the memory shards", exc_info=True)
