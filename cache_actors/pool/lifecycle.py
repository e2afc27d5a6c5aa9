"""Starting, finding and stopping a pool of memory shards."""

from __future__ import annotations

import re
import time
from pathlib import Path

import ray
from ray.exceptions import RayActorError

from cache_actors.home import Home
from cache_actors.pool.placement import claim_placement, load_placement
from cache_actors.pool.shard import SHARD_THREADS, MemoryShard, ShardInfo
from cache_actors.pool.shard_link import (
    POOL_EPOCH,
    RETRY_PAUSE_S,
    MemoryUnavailable,
    PoolInfo,
    ShardLink,
)

DEFAULT_START_TIMEOUT_S = 60.0

_ATTEMPT_S = 20.0
_STOP_TIMEOUT_S = 30.0


def start_pool(
    home: Home | Path,
    num_shards: int | None = None,
    ray_namespace: str = "marm",
    name: str = "default",
    *,
    max_rows_per_user: int | None = None,
    timeout_s: float = DEFAULT_START_TIMEOUT_S,
) -> PoolInfo:
    """The running pool of ``home``, started where it is not; concurrent starts give one pool.

    ``num_shards`` None takes the number that the pool was made with, or the default for a new one.
    The shards outlive this process. Rows that an earlier pool of the same home stored are served.
    """
    home = (home if isinstance(home, Home) else Home(home)).create()
    _check_name(name)
    placement = claim_placement(_placement_path(home, name), num_shards)
    pool = PoolInfo(home, name, ray_namespace, placement)
    deadline = time.monotonic() + timeout_s
    for shard in range(placement.num_shards):  # all of them first, so that they start side by side
        _create_shard(pool, shard, max_rows_per_user)
    for shard in range(placement.num_shards):
        info = _await_shard(pool, shard, max_rows_per_user, deadline)
        if info.max_rows_per_user != max_rows_per_user:
            raise ValueError(
                f"pool {name!r} runs with max_rows_per_user={info.max_rows_per_user}, got a "
                f"request for {max_rows_per_user}; stop the pool first, or ask for the same"
            )
    return pool


def connect_pool(home: Home | Path, ray_namespace: str = "marm", name: str = "default") -> PoolInfo:
    """The pool of ``home`` that another process started."""
    home = home if isinstance(home, Home) else Home(home)
    _check_name(name)
    placement = load_placement(_placement_path(home, name))
    pool = PoolInfo(home, name, ray_namespace, placement)
    for shard in range(placement.num_shards):
        if not _is_registered(pool, shard):
            raise MemoryUnavailable(
                f"no memory pool {name!r} runs for {home.path} in Ray namespace "
                f"{ray_namespace!r} (shard {shard} is missing); start it with start_pool"
            )
    return pool


def describe_pool(pool: PoolInfo, timeout_s: float = _ATTEMPT_S) -> list[ShardInfo]:
    """Where each shard runs."""
    links = [ShardLink(pool, shard) for shard in range(pool.placement.num_shards)]
    replies = [link.submit("describe") for link in links]
    return [link.result(reply, timeout_s) for link, reply in zip(links, replies, strict=True)]


def stop_pool(pool: PoolInfo, timeout_s: float = _STOP_TIMEOUT_S) -> None:
    """Stop every shard after its rows are safe on disk. They are served again by `start_pool`."""
    deadline = time.monotonic() + timeout_s
    for shard in range(pool.placement.num_shards):
        try:
            ShardLink(pool, shard).call("flush", timeout_s=timeout_s)
            ray.kill(ray.get_actor(pool.actor_name(shard), namespace=pool.ray_namespace))
        except (MemoryUnavailable, ValueError):
            continue  # it does not run, so there is nothing to stop
    for shard in range(pool.placement.num_shards):
        while _is_registered(pool, shard):
            if time.monotonic() >= deadline:
                raise MemoryUnavailable(f"shard {shard} did not stop within {timeout_s:.0f} s")
            time.sleep(RETRY_PAUSE_S)


def _create_shard(pool: PoolInfo, shard: int, max_rows_per_user: int | None) -> None:
    directory = _placement_path(pool.home, pool.name).parent / f"shard-{shard:03d}"
    ray.remote(concurrency_groups=SHARD_THREADS)(MemoryShard).options(
        name=pool.actor_name(shard),
        namespace=pool.ray_namespace,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=0,
        scheduling_strategy="SPREAD",
    ).remote(shard, POOL_EPOCH, directory, max_rows_per_user)


def _await_shard(
    pool: PoolInfo, shard: int, max_rows_per_user: int | None, deadline: float
) -> ShardInfo:
    """The shard's description once it runs. One that was being stopped is made again."""
    link = ShardLink(pool, shard)
    while True:
        try:
            left_s = max(deadline - time.monotonic(), RETRY_PAUSE_S)
            info: ShardInfo = link.call("describe", timeout_s=min(_ATTEMPT_S, left_s))
            return info
        except MemoryUnavailable:
            if time.monotonic() + RETRY_PAUSE_S >= deadline:
                raise
        time.sleep(RETRY_PAUSE_S)
        try:
            _create_shard(pool, shard, max_rows_per_user)
        except RayActorError:
            continue


def _is_registered(pool: PoolInfo, shard: int) -> bool:
    try:
        ray.get_actor(pool.actor_name(shard), namespace=pool.ray_namespace)
    except ValueError:
        return False
    return True


def _placement_path(home: Home, name: str) -> Path:
    return home.memory / f"{name}-{POOL_EPOCH}" / "placement.json"


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise ValueError(f"a pool name must match [a-z0-9][a-z0-9_-]*, got {name!r}; rename it")
