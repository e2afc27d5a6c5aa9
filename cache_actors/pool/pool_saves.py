"""Saves to a whole pool: in order for every user, also while its bucket moves between shards."""

from __future__ import annotations

import contextlib
import threading
import time
from functools import partial
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from cache_actors.pool.errors import MemoryUnavailable
from cache_actors.pool.placement import PlacementError
from cache_actors.pool.routes import Routes
from cache_actors.pool.save_queue import SaveAck, SaveQueue, Send
from cache_actors.pool.shard_link import RETRY_PAUSE_S
from cache_actors.store.errors import MemoryFullError
from cache_actors.store.namespace_writer import BucketMovedError
from marm.addressing import user_bucket
from marm.memory import Namespace

_SAVE_ATTEMPT_S = 30.0
_MAX_ROWS_PER_SAVE_CALL = 16384
_MIN_ROWS_PER_SAVE_CALL = 64
_INLINE_BYTES = 100 << 10
"""Larger arguments go through the object store, which takes time that can be spent ahead."""


class PoolSaves:
    """Queues of saves, one per shard that the pool had when this was made.

    A user stays in its queue when its bucket moves, so that its saves stay in order; where they
    are sent is looked up for every call.
    """

    def __init__(
        self, routes: Routes, namespace: Namespace, max_pending: int, deadline_s: float
    ) -> None:
        self._routes = routes
        self._namespace = namespace
        self._max_pending = max_pending
        self._deadline_s = deadline_s
        self._lanes = routes.placement
        self._queues: dict[int, SaveQueue] = {}
        self._lock = threading.Lock()

    @property
    def num_pending(self) -> int:
        """Saves that are not acknowledged yet."""
        return sum(queue.num_pending for queue in list(self._queues.values()))

    def save(self, user_ids: NDArray[np.int64], rows: NDArray[np.void]) -> SaveAck:
        """Queue rows; blocks while too many saves are under way."""
        opaque = np.ascontiguousarray(rows).view(_opaque(rows.dtype))
        stored = []
        for share in self._lanes.split(user_ids):
            mine = opaque.take(share.positions).view(rows.dtype)
            stored.append(self._queue(share.shard).put(user_ids[share.positions], mine))
        return SaveAck(stored)

    def close(self) -> None:
        """Return when every save was acknowledged or failed."""
        with self._lock:
            queues = list(self._queues.values())
        for queue in queues:
            queue.close()

    def _queue(self, lane: int) -> SaveQueue:
        # Made at the first save, so that a client that only reads has no threads for writing.
        with self._lock:
            if lane not in self._queues:
                self._queues[lane] = SaveQueue(
                    self._prepare, self._max_pending, _MAX_ROWS_PER_SAVE_CALL, f"memory-save-{lane}"
                )
            return self._queues[lane]

    def _prepare(self, user_ids: NDArray[np.int64], rows: NDArray[np.void]) -> Send:
        """Put rows that all go to one shard where it can map them, before it is their turn."""
        packed: Any = rows
        if rows.nbytes > _INLINE_BYTES and len(self._routes.placement.split(user_ids)) == 1:
            packed = ray.put(rows)

        def send() -> None:
            self._send_fitting(user_ids, rows, packed, time.monotonic() + self._deadline_s)

        return send

    def _send_fitting(
        self,
        user_ids: NDArray[np.int64],
        rows: NDArray[np.void],
        packed: Any,
        deadline: float,
    ) -> None:
        """Store rows, in smaller parts where a shard has no room for all of them at once: saves
        that waited were joined, and a shard can evict others' rows only between two calls."""
        try:
            self._send_until(user_ids, rows, packed, deadline)
        except MemoryFullError:
            middle = len(rows) // 2
            if middle < _MIN_ROWS_PER_SAVE_CALL:
                raise
            for part in (slice(middle), slice(middle, None)):
                self._send_fitting(user_ids[part], rows[part], rows[part], deadline)

    def _send_until(
        self,
        user_ids: NDArray[np.int64],
        rows: NDArray[np.void],
        packed: Any,
        deadline: float,
    ) -> None:
        """Store rows at whoever owns their users; what has moved is sent after it. ``packed`` are
        the same rows, as they are sent if all go to one shard."""
        shares = self._routes.placement.split(user_ids)
        for share in shares:
            mine, ids, sent = rows, user_ids, packed
            if len(shares) > 1:
                mine = rows.view(_opaque(rows.dtype)).take(share.positions).view(rows.dtype)
                ids, sent = user_ids[share.positions], mine
            try:
                self._routes.shard(share.shard).call_until(
                    "save",
                    self._namespace,
                    ids,
                    sent,
                    attempt_s=_SAVE_ATTEMPT_S,
                    deadline_s=max(0.0, deadline - time.monotonic()),
                    is_wanted=partial(self._owns, share.shard, ids),
                )
            except MemoryUnavailable:
                if self._owns(share.shard, ids):
                    raise
                self._send_until(ids, mine, mine, deadline)
            except BucketMovedError as error:
                if time.monotonic() + RETRY_PAUSE_S >= deadline:
                    raise MemoryUnavailable(
                        f"no shard owned the users of {len(ids)} rows for {self._deadline_s:.0f} s"
                    ) from error
                self._routes.refresh(np.unique(user_bucket(ids)), share.shard)
                time.sleep(RETRY_PAUSE_S / 10)
                self._send_until(ids, mine, mine, deadline)

    def _owns(self, shard: int, user_ids: NDArray[np.int64]) -> bool:
        """Whether a shard that does not answer owns all of some users still: one that a rebalance
        emptied has been stopped."""
        with contextlib.suppress(PlacementError):
            self._routes.refresh()
        shares = self._routes.placement.split(user_ids)
        return all(share.shard == shard for share in shares)


def _opaque(dtype: np.dtype) -> np.dtype:
    """Rows are moved as opaque bytes: numpy copies structured rows field by field."""
    return np.dtype((np.void, dtype.itemsize))
