"""``marm memory forget``: remove users from everything that can be read or replayed."""

from __future__ import annotations

import time
from typing import Annotated

import numpy as np
import typer

from app.cli.memory.pools import DEFAULT_POOL, PoolOption, started_pool
from app.cli.options import DEFAULT_HOME, AddressOption, HomeOption
from app.cli.session import console, to_json
from cache_actors.event_log.erase import ErasedEvents, erase_users, user_events
from cache_actors.event_log.log import EventLog
from cache_actors.exposure_log.erase import erase_exposures
from cache_actors.home import Home
from cache_actors.transfer.forget import forget_in_snapshot
from cache_actors.transfer.pool_memory import PoolMemory
from cache_actors.transfer.restore import open_snapshot

LEFT_OVER = (
    "Not reached: models keep what they learned; checkpoints in runs/ hold predictions by user id; "
    "snapshots that were not given as --snapshot still hold rows; a running ingress still writes "
    "the exposures of its last seconds (repeat this for them)."
)


def forget_command(
    users: Annotated[list[int], typer.Argument(help="Ids of users.")],
    home: HomeOption = DEFAULT_HOME,
    pool: PoolOption = DEFAULT_POOL,
    until_ms: Annotated[
        int | None,
        typer.Option(help="Forget up to this time; default: everything that there is now."),
    ] = None,
    snapshot: Annotated[
        list[str] | None, typer.Option(help="A snapshot to remove them from too. Repeatable.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    address: AddressOption = None,
) -> None:
    """Remove users from every shard, replica and tier, the event log and the exposures, for good.

    Old events of theirs that come again are refused; events from after the time begin a new
    history. It may be repeated. Prints counts as JSON.
    """
    target, asked = Home(home), list(dict.fromkeys(users))
    for url in snapshot or []:
        open_snapshot(url)  # refuses before anything is removed
    if not yes:
        names = ", ".join(map(str, asked))
        typer.confirm(f"Remove all rows and events of {names}? It can't be undone.", abort=True)
    with started_pool(target, pool, address) as memory:
        until_ms_of = dict.fromkeys(asked, until_ms) if until_ms is not None else {}
        for user in asked:
            until = until_ms_of.setdefault(user, newest_ms(target, memory, user))
            memory.forget(user, until)
    erased = erase_in_log(target, until_ms_of)
    exposures_removed = erase_exposures(target.exposures, until_ms_of)
    rows_in = {url: forget_in_snapshot(url, until_ms_of).rows for url in snapshot or []}
    console.print(LEFT_OVER)
    report = {
        "until_ms": {str(user): until for user, until in until_ms_of.items()},
        "events_erased": erased.events,
        "log_files_rewritten": erased.files_rewritten,
        "exposures_removed": exposures_removed,
        "rows_removed_from_snapshots": rows_in,
    }
    typer.echo(to_json(report))


def newest_ms(home: Home, memory: PoolMemory, user_id: int) -> int:
    """Now, or the time of the user's newest event or row where a client's clock was ahead."""
    newest = [time.time_ns() // 1_000_000]
    newest += user_events(EventLog(home.log), user_id).timestamp_ms[-1:].tolist()
    for namespace in memory.namespaces():
        rows = memory.client(namespace).fetch(np.array([user_id]), 1, layers=0).rows
        newest += rows["timestamp_ms"].tolist()
    return max(newest)


def erase_in_log(home: Home, until_ms_of: dict[int, int]) -> ErasedEvents:
    """Erase the users' events; a home without a log has none."""
    if not (home.log / "segments").is_dir():
        return ErasedEvents(0, 0, 0)
    return erase_users(home.log, until_ms_of)
