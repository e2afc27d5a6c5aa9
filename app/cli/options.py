"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HomeOption = Annotated[
    Path, typer.Option("--home", help="Directory of the deployment: log, memory, models, runs.")
]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", help="Ray cluster; default: the one running here, else a new one."),
]
ShardsOption = Annotated[
    int | None,
    typer.Option("--shards", min=1, help="Shards of a new memory pool; an old one keeps its own."),
]
MemoryFileOption = Annotated[
    Path | None,
    typer.Option(
        "--memory",
        help="YAML with a memory section (a Serve config will do): settings of the pool.",
    ),
]

DEFAULT_HOME = Path("marm-home")
