"""The pool that a command is about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from app.build import RAY_NAMESPACE, start_memory
from app.cli.session import ray_session
from app.memory_args import PoolSettings
from cache_actors.home import Home
from cache_actors.pool.config import PoolConfig
from cache_actors.pool.placement import Placement
from cache_actors.pool.shard_link import POOL_EPOCH, PoolInfo
from cache_actors.transfer.pool_memory import PoolMemory

PoolOption = Annotated[str, typer.Option("--pool", help="Name of the pool, as in serve_config.")]
DEFAULT_POOL = "default"
AS_STORED = PoolSettings()


@contextmanager
def opened_pool(home: Home, name: str, address: str | None) -> Iterator[PoolMemory]:
    """A pool that exists, started as it was if it does not run. One that was started on a cluster
    of the command's own ends with it; its rows stay."""
    if not pool_directory(home, name).is_dir():
        raise ValueError(
            f"there is no memory of a pool {name!r} at {home.path}, only of "
            f"{known_pools(home) or 'none'}; run `marm train` or `marm demo` first, or give the "
            "--home and --pool that they used"
        )
    with started_pool(home, name, address) as memory:
        yield memory


@contextmanager
def started_pool(
    home: Home, name: str, address: str | None, settings: PoolSettings = AS_STORED
) -> Iterator[PoolMemory]:
    """`opened_pool`, or a new pool where there is none; with ``settings`` where they are given."""
    if not home.memory.is_dir():
        raise ValueError(
            f"there is no memory at {home.path}; run `marm train` or `marm demo` first, or give "
            "--home the directory that they used"
        )
    with ExitStack() as stack:
        stack.enter_context(ray_session(address))
        pool = start_memory(home, settings, name)
        yield stack.enter_context(PoolMemory(pool))


def pool_directory(home: Home, name: str) -> Path:
    """What the shards of a pool share, whether or not it runs."""
    return PoolInfo(home, name, RAY_NAMESPACE, Placement.even(1), PoolConfig()).directory


def known_pools(home: Home) -> list[str]:
    """Names of the pools that have been started at a home."""
    suffix = f"-{POOL_EPOCH}"
    found = home.memory.glob(f"*{suffix}") if home.memory.is_dir() else ()
    return sorted(path.name.removesuffix(suffix) for path in found)
