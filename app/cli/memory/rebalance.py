"""``marm memory rebalance``: another number of shards, while the pool is in use."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from app.cli.memory.hit_rate_probe import HitRateProbe, sample_users
from app.cli.memory.pools import DEFAULT_POOL, PoolOption, opened_pool
from app.cli.options import DEFAULT_HOME, AddressOption, HomeOption
from app.cli.session import console, progress_bar, to_json
from cache_actors.home import Home
from cache_actors.pool.placement import BucketMove, load_placement, moves_to
from cache_actors.pool.rebalance import rebalance


def rebalance_command(
    shards: Annotated[int, typer.Option(min=1, help="Shards that the pool is to have.")],
    home: HomeOption = DEFAULT_HOME,
    pool: PoolOption = DEFAULT_POOL,
    probe_users: Annotated[
        int, typer.Option(min=0, help="Users to read all the while, to see the hit rate.")
    ] = 256,
    address: AddressOption = None,
) -> None:
    """Move buckets between shards until there are so many, while reads and writes go on.

    One that was broken off goes on when it is started again. Prints a report as JSON.
    """
    with opened_pool(Home(home), pool, address) as memory, progress_bar() as bars:
        moves = moves_to(load_placement(memory.pool.placement_path), shards)
        task = bars.add_task("moving buckets", total=len(moves), note="")

        def show(move: BucketMove) -> None:
            bars.update(task, advance=1, note=f"bucket {move.bucket} to shard {move.target}")

        with HitRateProbe(memory.pool, sample_users(memory, probe_users)) as probe:
            report = rebalance(memory.pool, shards, on_move=show)
    console.print(
        f"{report.num_shards_before} -> {report.num_shards} shards: {report.buckets_moved} buckets "
        f"with {report.rows_moved:,} rows in {report.seconds:.1f} s"
    )
    typer.echo(to_json({**asdict(report), "probe": asdict(probe.report)}))
