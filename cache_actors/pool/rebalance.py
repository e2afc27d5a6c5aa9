"""Changing the number of shards of a pool that is in use: buckets move from shard to shard, live.

Who owns a bucket is decided by the stores of the shards; the placement follows them. So whatever
is broken off half-way, a second run finds out how far it got and goes on.
"""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cache_actors.pool.errors import HandoverLostError, MemoryUnavailable
from cache_actors.pool.leader_link import LeaderLink
from cache_actors.pool.lifecycle import start_shards, stop_shards
from cache_actors.pool.placement import (
    BucketMove,
    Placement,
    load_placement,
    moves_to,
    store_placement,
)
from cache_actors.pool.shard_link import RETRY_PAUSE_S, PoolInfo
from marm.addressing import NUM_BUCKETS

logger = logging.getLogger(__name__)

_CALL_S = 20.0
_START_S = 120.0
_STOP_S = 30.0
_BUCKETS_PER_MOVE = 16


class RebalanceRunningError(RuntimeError):
    """Another process rebalances the pool."""


@dataclass(frozen=True)
class RebalanceReport:
    """What a rebalance did."""

    num_shards_before: int
    num_shards: int
    buckets_moved: int
    rows_moved: int
    seconds: float


def rebalance(
    pool: PoolInfo,
    num_shards: int,
    *,
    move_timeout_s: float = 600.0,
    on_move: Callable[[BucketMove], None] | None = None,
) -> RebalanceReport:
    """Move buckets until ``num_shards`` shards own nearly equal numbers of them.

    Reads and writes go on meanwhile. ``on_move`` is told of each bucket that has moved. A move that
    is broken off by the restart of a shard is begun again, for up to ``move_timeout_s``.
    """
    with _alone(pool):
        began = time.monotonic()
        before = load_placement(pool.placement_path)
        moves_to(before, num_shards)  # refuses an impossible number before anything changes
        if num_shards > before.num_shards:
            store_placement(pool.placement_path, before.with_shards(num_shards))
            start_shards(pool, range(before.num_shards, num_shards), _START_S)
        placement = _reconciled(pool, load_placement(pool.placement_path))
        moves = moves_to(placement, num_shards)
        num_rows = 0
        for source, target, buckets in grouped(moves):
            num_rows += _move(pool, source, target, buckets, move_timeout_s)
            for bucket in buckets:
                placement = placement.moved(bucket, target)
            store_placement(pool.placement_path, placement)
            _leader(pool, source, "clear_buckets", buckets)
            for bucket in buckets:
                if on_move is not None:
                    on_move(BucketMove(bucket, source, target))
        retired = range(num_shards, placement.num_shards)
        if retired:
            store_placement(pool.placement_path, placement.with_shards(num_shards))
            stop_shards(pool, retired, _STOP_S)
        seconds = time.monotonic() - began
        return RebalanceReport(before.num_shards, num_shards, len(moves), num_rows, seconds)


def _reconciled(pool: PoolInfo, placement: Placement) -> Placement:
    """The placement as the stores have it, after a rebalance that was broken off; remains of
    unfinished copies are removed."""
    owned = np.stack(
        [_leader(pool, shard, "owned") for shard in range(placement.num_shards)]
    )  # [S, 256]
    owners = list(placement.shard_of_bucket)
    for bucket in range(NUM_BUCKETS):
        holders = np.flatnonzero(owned[:, bucket]).tolist()
        if holders and owners[bucket] not in holders:
            owners[bucket] = holders[0]
        for other in holders:
            if other != owners[bucket]:
                _leader(pool, other, "clear_buckets", [bucket])
    if tuple(owners) == placement.shard_of_bucket:
        return placement
    found = replace(placement, shard_of_bucket=tuple(owners), version=placement.version + 1)
    store_placement(pool.placement_path, found)
    return found


def grouped(moves: Sequence[BucketMove]) -> Iterator[tuple[int, int, list[int]]]:
    """Source, target and buckets of moves that are made together: most of what a move of a small
    bucket takes is the same for several."""
    by_pair: dict[tuple[int, int], list[int]] = {}
    for move in moves:
        by_pair.setdefault((move.source, move.target), []).append(move.bucket)
    for (source, target), buckets in by_pair.items():
        for start in range(0, len(buckets), _BUCKETS_PER_MOVE):
            yield source, target, buckets[start : start + _BUCKETS_PER_MOVE]


def _move(
    pool: PoolInfo, source: int, target: int, buckets: Sequence[int], timeout_s: float
) -> int:
    """Move buckets; begun again as long as shards fail. The number of rows copied."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            number = _leader(pool, source, "begin_move", buckets, target)
            num_rows = 0
            is_done = False
            while not is_done:
                progress = _leader(pool, source, "copy_next", number)
                num_rows, is_done = num_rows + progress.rows, progress.is_done
            _leader(pool, source, "finish_move", number)
            return num_rows
        except (HandoverLostError, MemoryUnavailable) as error:
            if time.monotonic() >= deadline:
                raise
            logger.warning("buckets %s have to be moved again: %s", buckets, error)
            if _have_moved(pool, source, buckets):
                return 0
            time.sleep(RETRY_PAUSE_S)


def _have_moved(pool: PoolInfo, source: int, buckets: Sequence[int]) -> bool:
    """Whether a move whose end was not heard of is complete: all its buckets move at once."""
    try:
        return not _leader(pool, source, "owned")[list(buckets)].any()
    except MemoryUnavailable:
        return False


def _leader(pool: PoolInfo, shard: int, method: str, *args: object) -> Any:
    """Call the leader of a shard, through its restarts where that is safe."""
    link = LeaderLink(pool, shard)
    if method in ("owned", "clear_buckets"):
        return link.call_until(method, *args, attempt_s=_CALL_S, deadline_s=4 * _CALL_S)
    return link.call(method, *args, timeout_s=_CALL_S)


@contextmanager
def _alone(pool: PoolInfo) -> Iterator[None]:
    with (pool.directory / "rebalance.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RebalanceRunningError(
                f"the memory pool in {pool.directory} is being rebalanced already; wait for that"
            ) from None
        yield
