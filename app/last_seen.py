"""The items that a user saw last, read at the edge when retrieval is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from marm.memory import Namespace
from stages.history import MemoryReader, read_history
from stages.request import StageRequest, empty_ids

MAX_SEEDS = 20


class LastSeen:
    """Reads the newest rows of a user from the memory that retrieval reads."""

    def __init__(
        self,
        open_memory: Callable[[Namespace], MemoryReader],
        namespace: Callable[[], Namespace | None],
    ) -> None:
        """``namespace`` gives the memory to read; None while it is not known yet."""
        self._open_memory = open_memory
        self._namespace = namespace

    async def __call__(self, request: StageRequest) -> NDArray[np.int64]:
        """Ids of the newest items, newest first; none when the memory does not answer."""
        namespace = self._namespace()
        if namespace is None:
            return empty_ids()
        # Opening a memory asks its shards, and reading may wait for one.
        return await asyncio.to_thread(self._read, namespace, request)

    def _read(self, namespace: Namespace, request: StageRequest) -> NDArray[np.int64]:
        history = read_history(self._open_memory(namespace), request, MAX_SEEDS, depth=0)
        return history.item_ids[::-1]
