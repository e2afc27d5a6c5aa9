"""``marm memory status``: what the pool holds, and what happened to it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import typer
from rich.table import Table

from app.cli.memory.plan import show_bytes
from app.cli.memory.pools import DEFAULT_POOL, PoolOption, opened_pool
from app.cli.options import DEFAULT_HOME, AddressOption, HomeOption
from app.cli.session import console, to_json
from cache_actors.home import Home
from cache_actors.pool.errors import MemoryUnavailable
from cache_actors.pool.placement import load_placement
from cache_actors.pool.shard_info import ShardInfo
from cache_actors.pool.shard_link import PoolInfo, ShardLink
from cache_actors.store.namespace_store import StoreStats
from cache_actors.transfer.restore_mark import read_restore_mark
from marm.memory import Namespace

_CALL_S = 20.0


@dataclass(frozen=True)
class ReplicaStatus:
    """One replica of a shard; ``info`` is None while it does not answer."""

    shard: int
    replica: int
    buckets: int
    info: ShardInfo | None
    held: dict[str, StoreStats]


def status_command(
    home: HomeOption = DEFAULT_HOME,
    pool: PoolOption = DEFAULT_POOL,
    address: AddressOption = None,
) -> None:
    """Users, rows, bytes, evictions and damage, by shard, replica and namespace.

    Prints a table for people, then one JSON object.
    """
    with opened_pool(Home(home), pool, address) as memory:
        replicas = pool_status(memory.pool)
        mark = read_restore_mark(memory.pool.directory)
    console.print(status_table(replicas))
    restore = None if mark is None else asdict(mark)
    typer.echo(to_json({"pool": pool, "shards": status_json(replicas), "restore": restore}))


def pool_status(pool: PoolInfo) -> list[ReplicaStatus]:
    """Every replica of every shard."""
    placement = load_placement(pool.placement_path)
    return [
        _replica_status(pool, shard, replica, len(placement.buckets_of(shard)))
        for shard in range(placement.num_shards)
        for replica in range(pool.config.replicas)
    ]


def _replica_status(pool: PoolInfo, shard: int, replica: int, buckets: int) -> ReplicaStatus:
    link = ShardLink(pool, shard, replica)
    try:
        info: ShardInfo = link.call("describe", timeout_s=_CALL_S)
        namespaces: list[Namespace] = link.call("namespaces", timeout_s=_CALL_S)
        held = {found.name: link.call("stats", found, timeout_s=_CALL_S) for found in namespaces}
    except MemoryUnavailable:
        return ReplicaStatus(shard, replica, buckets, None, {})
    return ReplicaStatus(shard, replica, buckets, info, held)


def status_table(replicas: list[ReplicaStatus]) -> Table:
    """The pool for people."""
    table = Table()
    for name in ("shard", "role", "namespace"):
        table.add_column(name)
    for name in ("users", "rows", "in use", "files", "newest step", "evicted", "damaged rows"):
        table.add_column(name, justify="right")
    for replica in replicas:
        shard = f"{replica.shard}.{replica.replica}"
        if replica.info is None:
            table.add_row(shard, "does not answer")
            continue
        role = "leads" if replica.info.leads else "follows"
        role = role if replica.info.is_member else "catching up"
        for name, held in replica.held.items() or [("", None)]:
            if held is None:
                table.add_row(shard, role, "no rows yet")
                continue
            counters = held.counters
            table.add_row(
                shard,
                role,
                name,
                f"{held.users:,}",
                f"{held.rows:,}",
                show_bytes(held.stored_bytes),
                show_bytes(held.file_bytes),
                f"{counters.newest_step:,}",
                f"{counters.evicted_users:,}",
                f"{counters.damaged_rows:,}",
            )
    return table


def status_json(replicas: list[ReplicaStatus]) -> list[dict[str, Any]]:
    """The pool for programs."""
    return [
        {
            "shard": replica.shard,
            "replica": replica.replica,
            "buckets": replica.buckets,
            "answers": replica.info is not None,
            **({} if replica.info is None else _info_json(replica.info)),
            "namespaces": {
                name: {
                    "stored_bytes": held.stored_bytes,
                    "file_bytes": held.file_bytes,
                    **asdict(held.counters),
                }
                for name, held in replica.held.items()
            },
        }
        for replica in replicas
    ]


def _info_json(info: ShardInfo) -> dict[str, Any]:
    return {
        "node_id": info.node_id,
        "pid": info.pid,
        "path": str(info.path),
        "leads": info.leads,
        "is_member": info.is_member,
        "is_warm": info.is_warm,
    }
