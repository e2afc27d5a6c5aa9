"""Starting, finding and stopping a pool of memory shards."""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import replace
from pathlib import Path

from ray.exceptions import RayActorError

from cache_actors.home import Home
from cache_actors.pool.config import (
    MAX_REPLICAS,
    PoolConfig,
    PoolConfigError,
    check_change,
    claim_config,
    describe_change,
    load_config,
)
from cache_actors.pool.errors import MemoryUnavailable
from cache_actors.pool.home_lease import HomeLease
from cache_actors.pool.leader_link import LeaderLink
from cache_actors.pool.placement import Placement, claim_placement, load_placement
from cache_actors.pool.pool_id import claim_pool_id
from cache_actors.pool.shard import MemoryShard, cluster_id
from cache_actors.pool.shard_actors import (
    create_replica,
    end_replica,
    flush_replica,
    is_registered,
    nodes_of_shard,
    retire_replica,
)
from cache_actors.pool.shard_info import ShardInfo
from cache_actors.pool.shard_link import RETRY_PAUSE_S, PoolInfo, ShardLink

DEFAULT_START_TIMEOUT_S = 60.0

_ATTEMPT_S = 20.0
_STOP_TIMEOUT_S = 30.0


def start_pool(
    home: Home | Path,
    num_shards: int | None = None,
    ray_namespace: str = "marm",
    name: str = "default",
    *,
    config: PoolConfig | None = None,
    timeout_s: float = DEFAULT_START_TIMEOUT_S,
) -> PoolInfo:
    """The running pool of ``home``, started where it is not; concurrent starts give one pool.

    ``num_shards`` None takes the number that the pool was made with, or the default for a new one;
    ``config`` None takes the settings it was last started with. The shards outlive this process.
    Rows that an earlier pool of the same home stored are served.

    Raises:
        PoolInUseError: another Ray cluster runs the pool.
        PlacementError, PoolConfigError: the pool exists with settings that cannot change so.
    """
    home = (home if isinstance(home, Home) else Home(home)).create()
    pool = _pool_info(home, name, ray_namespace)
    HomeLease(pool.directory, cluster_id()).acquire()
    if num_shards is None and config is not None:
        num_shards = config.num_shards
    placement = claim_placement(pool.placement_path, num_shards)
    pool = replace(pool, placement=placement, pool_id=claim_pool_id(pool.directory))
    if config is not None:
        check_change(_config_path(pool), config)
        _check_running(pool, config)
    pool = replace(pool, config=claim_config(_config_path(pool), config))
    start_shards(pool, range(placement.num_shards), timeout_s)
    return pool


def start_shards(pool: PoolInfo, shards: range, timeout_s: float) -> None:
    """Return when every replica of ``shards`` runs and is up to date."""
    deadline = time.monotonic() + timeout_s
    wanted = [(shard, r) for shard in shards for r in range(pool.config.replicas)]
    for shard in shards:  # all of them first, so that they start side by side
        avoid = nodes_of_shard(pool, shard) if pool.config.replicas > 1 else frozenset()
        for replica in range(pool.config.replicas):
            node_id = create_replica(MemoryShard, pool, shard, replica, avoid)
            avoid |= {node_id} if pool.config.replicas > 1 else set()
    for shard, replica in wanted:
        _await_member(pool, shard, replica, deadline)


def stored_pool(home: Home | Path, ray_namespace: str = "marm", name: str = "default") -> PoolInfo:
    """The pool of ``home`` as it was last started, whether or not it runs.

    Raises:
        PlacementError, PoolConfigError: it was never started, or its files are damaged.
    """
    pool = _pool_info(home if isinstance(home, Home) else Home(home), name, ray_namespace)
    placement = load_placement(pool.placement_path)
    config, pool_id = load_config(_config_path(pool)), claim_pool_id(pool.directory)
    return replace(pool, placement=placement, config=config, pool_id=pool_id)


def stored_config(
    home: Home | Path, ray_namespace: str = "marm", name: str = "default"
) -> PoolConfig | None:
    """The settings that the pool was last started with; None if it never was."""
    pool = _pool_info(home if isinstance(home, Home) else Home(home), name, ray_namespace)
    path = _config_path(pool)
    return load_config(path) if path.exists() else None


def connect_pool(home: Home | Path, ray_namespace: str = "marm", name: str = "default") -> PoolInfo:
    """The pool of ``home`` that another process started."""
    pool = stored_pool(home, ray_namespace, name)
    for shard in range(pool.placement.num_shards):
        if not any(is_registered(pool, shard, r) for r in range(pool.config.replicas)):
            raise MemoryUnavailable(
                f"no memory pool {name!r} runs for {pool.home.path} in Ray namespace "
                f"{ray_namespace!r} (shard {shard} is missing); start it with start_pool"
            )
    return pool


def describe_pool(pool: PoolInfo, timeout_s: float = _ATTEMPT_S) -> list[ShardInfo]:
    """Where each replica of each shard runs, shard by shard."""
    placement = load_placement(pool.placement_path)
    links = [
        ShardLink(pool, shard, replica)
        for shard in range(placement.num_shards)
        for replica in range(pool.config.replicas)
    ]
    replies = [link.submit("describe") for link in links]
    return [link.result(reply, timeout_s) for link, reply in zip(links, replies, strict=True)]


def stop_pool(pool: PoolInfo, timeout_s: float = _STOP_TIMEOUT_S) -> None:
    """Stop every shard after its rows are safe on disk. They are served again by `start_pool`."""
    placement = load_placement(pool.placement_path)
    stop_shards(pool, range(placement.num_shards), timeout_s)
    HomeLease(pool.directory, cluster_id()).release()


def stop_shards(pool: PoolInfo, shards: range, timeout_s: float) -> None:
    """Stop the replicas of some shards; those that do not run are stopped already.

    The leader goes last of its shard: it is the one that has to be found up to date again.
    """
    deadline = time.monotonic() + timeout_s
    for shard in shards:
        leader = LeaderLink(pool, shard).leader.replica
        others = [r for r in range(pool.config.replicas) if r != leader]
        for replica in (*others, leader):
            retire_replica(pool, shard, replica)
        for replica in (*others, leader):
            flush_replica(pool, shard, replica, timeout_s / 3)
            end_replica(pool, shard, replica)
    for shard in shards:
        for replica in range(pool.config.replicas):
            while is_registered(pool, shard, replica):
                if time.monotonic() >= deadline:
                    raise MemoryUnavailable(f"shard {shard} did not stop within {timeout_s:.0f} s")
                end_replica(pool, shard, replica)  # its peer may have made it anew meanwhile
                time.sleep(RETRY_PAUSE_S)


def _await_member(pool: PoolInfo, shard: int, replica: int, deadline: float) -> ShardInfo:
    """The replica's description once it is up to date. One that was being stopped is made again."""
    link = ShardLink(pool, shard, replica)
    while True:
        try:
            left_s = max(deadline - time.monotonic(), RETRY_PAUSE_S)
            info: ShardInfo = link.call("describe", timeout_s=min(_ATTEMPT_S, left_s))
            if info.is_member:
                return info
            if time.monotonic() + RETRY_PAUSE_S >= deadline:
                raise link.unavailable("is still catching up with its peer")
        except MemoryUnavailable:
            if time.monotonic() + RETRY_PAUSE_S >= deadline:
                raise
            with contextlib.suppress(RayActorError):  # the actor that ends still has its name
                create_replica(MemoryShard, pool, shard, replica, frozenset())
        time.sleep(RETRY_PAUSE_S)


def _check_running(pool: PoolInfo, wanted: PoolConfig) -> None:
    """Refuse other settings than those with which the pool runs, if it does."""
    wanted = replace(wanted, num_shards=None)
    for replica in range(MAX_REPLICAS):
        if is_registered(pool, 0, replica):
            info: ShardInfo = ShardLink(pool, 0, replica).call("describe", timeout_s=_ATTEMPT_S)
            if info.config != wanted:
                raise PoolConfigError(
                    f"pool {pool.name!r} runs with {describe_change(info.config, wanted)}; stop "
                    "the pool first (`marm memory stop`), or leave the setting out"
                )


def _pool_info(home: Home, name: str, ray_namespace: str) -> PoolInfo:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise ValueError(f"a pool name must match [a-z0-9][a-z0-9_-]*, got {name!r}; rename it")
    return PoolInfo(home, name, ray_namespace, Placement.even(1), PoolConfig())


def _config_path(pool: PoolInfo) -> Path:
    return pool.directory / "pool.json"
