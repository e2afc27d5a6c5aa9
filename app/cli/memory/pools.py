"""The pool that a command is about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from app.build import RAY_NAMESPACE
from app.cli.session import ray_session
from cache_actors.home import Home
from cache_actors.pool.lifecycle import start_pool
from cache_actors.pool.shard_link import PoolInfo

PoolOption = Annotated[str, typer.Option("--pool", help="Name of the pool, as in serve_config.")]
DEFAULT_POOL = "default"


@contextmanager
def opened_pool(
    home: Home, name: str, address: str | None, num_shards: int | None = None
) -> Iterator[PoolInfo]:
    """The pool of a home that exists, started if it does not run.

    A pool that was started on a cluster of the command's own ends with it; its rows stay.
    """
    if not home.memory.is_dir():
        raise ValueError(
            f"there is no memory at {home.path}; run `marm train` or `marm demo` first, or give "
            "--home the directory that they used"
        )
    with ray_session(address):
        yield start_pool(home, num_shards, RAY_NAMESPACE, name)
