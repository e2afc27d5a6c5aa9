"""``marm memory plan``: what a memory of a given size takes. Nothing is started or looked up."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from app.cli.session import console, to_json
from marm.capacity import Layout, Load, Machines, MemorySize, Traffic, lay_out, load_of
from marm.memory import Namespace

GIB = 1 << 30


def plan_command(
    users: Annotated[int, typer.Option(help="Users with a memory.")],
    rows: Annotated[int, typer.Option(help="Rows per user, on average.")],
    depth: Annotated[int, typer.Option(help="Layers that are stored: L.")] = 2,
    dim: Annotated[int, typer.Option(help="Width of a stored vector: D.")] = 32,
    dtype: Annotated[str, typer.Option(help="float16, float32 or int8.")] = "float16",
    qps: Annotated[float, typer.Option(min=0, help="Requests per second.")] = 100.0,
    rows_read: Annotated[
        int | None, typer.Option(min=0, help="Newest rows that a read takes; default: all.")
    ] = None,
    layers_read: Annotated[
        int | None, typer.Option(min=0, help="Layers that a read takes; default: all.")
    ] = None,
    reads: Annotated[
        float, typer.Option(min=0, help="Reads of the memory per request (stages that read).")
    ] = 1.0,
    candidates: Annotated[
        int, typer.Option(min=0, help="Items that a request scores; they share its reads.")
    ] = 200,
    events_per_day: Annotated[
        float, typer.Option(min=0, help="New rows per user and day; 133 is the paper's.")
    ] = 133.0,
    replicas: Annotated[int, typer.Option(min=1, max=2, help="Copies, on distinct nodes.")] = 1,
    node_gib: Annotated[
        float, typer.Option(min=0, help="GiB of memory that a node has for it.")
    ] = 64.0,
    shard_gib: Annotated[
        float | None, typer.Option(min=0, help="At most so many GiB per shard; default: 64.")
    ] = None,
    remote_share: Annotated[
        float | None,
        typer.Option(help="Share of reads from other nodes; default: users are on any node."),
    ] = None,
    hot_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the rows that is to be in RAM.")
    ] = 1.0,
    redis_overhead: Annotated[
        float | None,
        typer.Option(
            min=0, help="Redis over payload, less 1, as you measured it; default: computed."
        ),
    ] = None,
    ram_price: Annotated[
        float | None, typer.Option(min=0, help="Of a GiB of a node's RAM per month, any currency.")
    ] = None,
    disk_price: Annotated[
        float | None, typer.Option(min=0, help="Of a GiB of disk per month, same currency.")
    ] = None,
    redis_price: Annotated[
        float | None, typer.Option(min=0, help="Of a GiB of Redis per month, same currency.")
    ] = None,
) -> None:
    """Bytes, shards, nodes, bandwidth and cost of a memory, from its size alone.

    Prints a table for people, then one JSON object. Costs are left out where no price is given:
    none is built in.
    """
    size = MemorySize(users, rows, Namespace(depth=depth, dim=dim, dtype=dtype))
    machines = Machines(
        round(node_gib * GIB),
        None if shard_gib is None else round(shard_gib * GIB),
        replicas,
        remote_share,
    )
    traffic = Traffic(
        qps=qps,
        reads_per_request=reads,
        rows_read=rows if rows_read is None else rows_read,
        layers_read=depth if layers_read is None else layers_read,
        candidates=candidates,
        events_per_user_day=events_per_day,
    )
    layout = lay_out(size, machines)
    load = load_of(size, traffic, machines, layout)
    redis = size.redis_block_bytes
    if redis_overhead is not None:
        redis = round(size.payload_bytes * (1 + redis_overhead))
    tiers = tier_costs(size, layout, redis, hot_share, (ram_price, disk_price, redis_price))
    console.print(plan_table(size, layout, load, redis, tiers))
    typer.echo(to_json(plan_json(size, layout, load, redis, tiers)))


def tier_costs(
    size: MemorySize,
    layout: Layout,
    redis_bytes: int,
    hot_share: float,
    prices: tuple[float | None, float | None, float | None],
) -> dict[str, float | None]:
    """Per month and tier, in the currency of the prices; None where a price is missing."""
    ram, disk, redis = prices

    def priced(*parts: tuple[float, float | None]) -> float | None:
        cost = 0.0
        for num_bytes, price in parts:
            if price is None:
                return None
            cost += num_bytes / GIB * price
        return cost

    held = layout.total_bytes
    return {
        "local": priced((held * hot_share, ram), (held, disk)),
        "redis": priced((redis_bytes, redis)),
        "log": priced((size.log_bytes, disk)),
    }


def plan_table(
    size: MemorySize, layout: Layout, load: Load, redis: int, costs: dict[str, float | None]
) -> Table:
    """The plan for people."""
    table = Table(title=f"{size.users:,} users, {size.rows:,} rows each, {size.namespace.name}")
    table.add_column("what")
    table.add_column("how much", justify="right")
    table.add_column("note")
    table.add_row("vectors", show_bytes(size.vector_bytes), f"{size.vector_bytes_per_row} B a row")
    table.add_row("rows", show_bytes(size.payload_bytes), f"{size.row_bytes} B a row")
    over = size.stored_bytes / size.payload_bytes
    table.add_row("stored, one copy", show_bytes(size.stored_bytes), f"{over:.3f} of the rows")
    table.add_row("stored, all replicas", show_bytes(layout.total_bytes), _cost(costs["local"]))
    table.add_row("shards", f"{layout.shards:,}", f"{show_bytes(layout.shard_bytes)} each")
    table.add_row("nodes", f"{layout.nodes:,}", "")
    table.add_row(
        "read", show_rate(load.read_bytes), f"{load.read_bytes_per_pair:,.0f} B a scored pair"
    )
    table.add_row("  on the node", show_rate(load.local_read_bytes), "memory bandwidth")
    table.add_row("  over the network", show_rate(load.network_read_bytes), "all nodes together")
    table.add_row("write", show_rate(load.write_bytes), f"{load.writes:,.0f} rows/s")
    table.add_row("  over the network", show_rate(load.network_write_bytes), "at most")
    table.add_row(
        "attention", f"{load.attention_macs / 1e9:,.1f} GMAC/s", "scores and sums, no projections"
    )
    table.add_row("Redis tier, blocks", show_bytes(redis), _cost(costs["redis"]))
    keys = size.redis_key_bytes / size.vector_bytes if size.vector_bytes else 0
    table.add_row(
        "Redis, the paper's keys", show_bytes(size.redis_key_bytes), f"{keys:.2f} of the vectors"
    )
    table.add_row("event log, to recompute", show_bytes(size.log_bytes), _cost(costs["log"]))
    return table


def plan_json(
    size: MemorySize, layout: Layout, load: Load, redis: int, costs: dict[str, float | None]
) -> dict[str, Any]:
    """The plan for programs: bytes, bytes per second, and cost per month."""
    return {
        "namespace": size.namespace.name,
        "users": size.users,
        "rows_per_user": size.rows,
        "row_bytes": size.row_bytes,
        "vector_bytes": size.vector_bytes,
        "payload_bytes": size.payload_bytes,
        "stored_bytes": size.stored_bytes,
        **asdict(layout),
        "per_second": asdict(load),
        "redis_block_bytes": redis,
        "redis_key_bytes": size.redis_key_bytes,
        "log_bytes": size.log_bytes,
        "cost_per_month": costs,
    }


def show_bytes(num_bytes: float) -> str:
    """Bytes in the largest decimal unit that gives at least 1."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if num_bytes >= 1000**power:
            return f"{num_bytes / 1000**power:,.2f} {unit}"
    return f"{num_bytes:.0f} B"


def show_rate(bytes_per_s: float) -> str:
    """A bandwidth."""
    return f"{show_bytes(bytes_per_s)}/s"


def _cost(cost: float | None) -> str:
    return "no price given" if cost is None else f"{cost:,.0f} a month"
