"""``marm memory export``: everything that is stored about a user, fit to be handed over."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from app.cli.memory.pools import DEFAULT_POOL, PoolOption, opened_pool
from app.cli.options import DEFAULT_HOME, AddressOption, HomeOption
from app.cli.session import console, to_json
from cache_actors.atomic_files import replace_text
from cache_actors.event_log.erase import user_events
from cache_actors.event_log.log import EventLog
from cache_actors.home import Home
from cache_actors.store.lookup import ALL_ROWS
from marm.events import BINARY_TASKS, EVENT_DTYPES, TASKS, EventBatch
from marm.memory import RAW_STEP, Namespace


def export_command(
    user: Annotated[int, typer.Argument(help="Id of a user.")],
    home: HomeOption = DEFAULT_HOME,
    pool: PoolOption = DEFAULT_POOL,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default: the terminal.")
    ] = None,
    address: AddressOption = None,
) -> None:
    """Every row of a user in every namespace, and every event in the log, as JSON Lines.

    With --output, what was written is counted in one JSON object on standard output.
    """
    target = Home(home)
    with opened_pool(target, pool, address) as memory:
        rows_of = {
            namespace: memory.client(namespace).fetch(np.array([user]), ALL_ROWS).rows
            for namespace in memory.namespaces()
        }
    events = user_events(EventLog(target.log), user)
    counts = {
        "user_id": user,
        "rows": {namespace.name: len(rows) for namespace, rows in rows_of.items()},
        "events": len(events),
    }
    lines = "".join(f"{to_json(line)}\n" for line in export_lines(user, rows_of, events))
    if output is None:
        sys.stdout.write(lines)
        console.print(f"{sum(map(len, rows_of.values()))} rows, {len(events)} events")
    else:
        replace_text(output, lines)
        typer.echo(to_json({**counts, "output": str(output)}))


def export_lines(
    user_id: int, rows_of: Mapping[Namespace, NDArray[np.void]], events: EventBatch
) -> Iterator[dict[str, Any]]:
    """One object per event, then one per row; what was not observed is null."""
    for index in range(len(events)):
        labels = dict(zip(TASKS, events.labels[index].tolist(), strict=True))
        fields = {name: int(getattr(events, name)[index]) for name in EVENT_DTYPES}
        yield {"kind": "event", **fields, "labels": labels}
    for namespace, rows in rows_of.items():
        for row in rows:
            yield {
                "kind": "row",
                "namespace": namespace.name,
                "user_id": user_id,
                **{name: int(row[name]) for name in row.dtype.names if name != "memory"},
                "signals": signals_of(int(row["feedback"])),
                "memory": None if row["written_step"] == RAW_STEP else row["memory"].tolist(),
            }


def signals_of(feedback: int) -> list[str]:
    """Tasks on which the row's event was positive."""
    return [task for bit, task in enumerate(BINARY_TASKS) if feedback >> bit & 1]
