"""``marm memory stop``: end the pool's processes; its rows and settings stay on disk."""

from __future__ import annotations

import typer

from app.build import RAY_NAMESPACE
from app.cli.memory.pools import DEFAULT_POOL, PoolOption
from app.cli.options import DEFAULT_HOME, AddressOption, HomeOption
from app.cli.session import console, ray_session, to_json
from cache_actors.home import Home
from cache_actors.pool.lifecycle import stop_pool, stored_pool
from cache_actors.pool.shard_actors import is_registered


def stop_command(
    home: HomeOption = DEFAULT_HOME,
    pool: PoolOption = DEFAULT_POOL,
    address: AddressOption = None,
) -> None:
    """Stop the pool, to change its settings or to move it; prints how many shards ran as JSON.

    The next `serve run`, `marm train` or `marm memory` command starts it as it was, or with the
    settings that it is given. Stop training and serving first: saves would wait for a new start,
    and requests be answered without memory.
    """
    found = stored_pool(Home(home), RAY_NAMESPACE, pool)
    replicas = range(found.config.replicas)
    with ray_session(address):
        running = [
            shard
            for shard in range(found.placement.num_shards)
            if any(is_registered(found, shard, replica) for replica in replicas)
        ]
        if running:
            stop_pool(found)
    if not running:
        console.print(f"pool {pool!r} does not run on this Ray cluster", highlight=False)
    typer.echo(to_json({"pool": pool, "stopped_shards": len(running)}))
