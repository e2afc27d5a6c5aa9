"""``marm memory snapshot`` and ``restore``: a warm hand-over to another pool or cluster."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from app.cli.memory.plan import show_bytes
from app.cli.memory.pools import (
    DEFAULT_POOL,
    PoolOption,
    opened_pool,
    pool_directory,
    started_pool,
)
from app.cli.memory.settings import read_memory_args
from app.cli.options import (
    DEFAULT_HOME,
    AddressOption,
    HomeOption,
    MemoryFileOption,
    ShardsOption,
)
from app.cli.session import console, progress_bar, to_json
from cache_actors.home import Home
from cache_actors.transfer.manifest import Manifest
from cache_actors.transfer.restore import open_snapshot, restore_snapshot
from cache_actors.transfer.restore_mark import abandon_restore, restoring
from cache_actors.transfer.snapshot import SnapshotProgress, snapshot

UrlArgument = Annotated[
    str, typer.Argument(help="A directory, or a URL as of fsspec: s3://bucket/prefix, ...")
]


def snapshot_command(
    url: UrlArgument,
    home: HomeOption = DEFAULT_HOME,
    pool: PoolOption = DEFAULT_POOL,
    address: AddressOption = None,
) -> None:
    """Copy every row to a new place, while the pool is in use; prints what was copied as JSON."""
    with opened_pool(Home(home), pool, address) as memory, progress_bar() as bars:
        task = bars.add_task("copying buckets", total=None, note="")

        def show(done: SnapshotProgress) -> None:
            note = f"{done.rows:,} rows, {show_bytes(done.num_bytes)}"
            bars.update(task, completed=done.buckets, total=done.of_buckets, note=note)

        manifest = snapshot(
            memory, url, shard_of_bucket=memory.pool.placement.shard_of_bucket, progress=show
        )
    typer.echo(to_json(manifest_summary(manifest)))


def restore_command(
    url: Annotated[str | None, typer.Argument(help="What `snapshot` was given.")] = None,
    home: HomeOption = DEFAULT_HOME,
    pool: PoolOption = DEFAULT_POOL,
    memory_file: MemoryFileOption = None,
    shards: ShardsOption = None,
    abandon: Annotated[
        bool, typer.Option("--abandon", help="Wait no more for a restore that was broken off.")
    ] = False,
    address: AddressOption = None,
) -> None:
    """Bring the rows of a snapshot into the pool, which may be in use; prints counts as JSON.

    Rows that are stored already are kept. Until it is done, `/healthz` answers 503. It may be
    repeated.
    """
    target = Home(home)
    if abandon == (url is not None):
        raise ValueError("give either the URL of a snapshot, or --abandon to wait for none")
    if url is None:
        given_up = abandon_restore(pool_directory(target, pool))
        typer.echo(to_json({"abandoned": None if given_up is None else asdict(given_up)}))
        return
    settings = read_memory_args(memory_file, shards=shards)
    found = open_snapshot(url)  # refuses before anything is started
    target.create()
    with (
        started_pool(target, pool, address, settings) as memory,
        restoring(memory.pool.directory, url) as restored_rows,
        progress_bar() as bars,
    ):
        task = bars.add_task("restoring parts", total=len(found.manifest.parts), note="")

        def show(done: SnapshotProgress) -> None:
            bars.update(task, completed=done.buckets, note=f"{done.rows:,} rows")

        restored = restore_snapshot(found, memory, show)
        restored_rows.append(restored.rows)
    console.print(f"{restored.rows:,} rows of {restored.users:,} users are in the pool")
    typer.echo(to_json(asdict(restored)))


def manifest_summary(manifest: Manifest) -> dict[str, Any]:
    """A manifest without its parts."""
    rows_of = {namespace.name: 0 for namespace in manifest.namespaces}
    users_of = dict(rows_of)
    for part in manifest.parts:
        rows_of[part.namespace] += part.rows
        users_of[part.namespace] += part.users
    return {
        "snapshot_id": manifest.snapshot_id,
        "namespaces": {name: {"users": users_of[name], "rows": rows_of[name]} for name in rows_of},
        "rows": manifest.rows,
        "bytes": manifest.num_bytes,
        "parts": len(manifest.parts),
        "forgotten_users": len(manifest.forgotten),
        "seconds": (manifest.finished_ms - manifest.started_ms) / 1000,
    }
