"""``marm keys``: API keys of a home."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.markup import escape

from app.api_keys import ApiKeys, Role, StoredKey
from app.cli.options import DEFAULT_HOME, HomeOption
from app.cli.session import console
from app.key_guards import KEY_HEADER
from cache_actors.home import Home

keys_app = typer.Typer(
    help="API keys for feedback and administration. Running servers follow within seconds.",
    no_args_is_help=True,
)


@keys_app.command()
def create(
    role: Annotated[
        Role,
        typer.Option(help="'feedback' sends events; 'test' overrides arms; 'admin' does it all."),
    ] = "feedback",
    note: Annotated[str, typer.Option(help="Whose it is, to be shown in lists.")] = "",
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Make a key. It is shown once, on standard output, and stored as a hash."""
    text, key = ApiKeys(Home(home)).create(role, note)
    console.print(
        f"API key {key.id} with the role {escape(role)}; send it in the header {KEY_HEADER}. "
        "It is shown only now:",
        highlight=False,
        soft_wrap=True,
    )
    typer.echo(text)


@keys_app.command("list")
def list_keys(home: HomeOption = DEFAULT_HOME) -> None:
    """All keys, one JSON line each; never a key itself."""
    for key in ApiKeys(Home(home)).read():
        typer.echo(json.dumps(_shown(key)))


@keys_app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="Id of the key: the part after 'marm_'.")],
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Forget a key: servers refuse it within a second or two."""
    key = ApiKeys(Home(home)).revoke(key_id)
    typer.echo(json.dumps({"revoked": _shown(key)}))


def _shown(key: StoredKey) -> dict[str, object]:
    return key.model_dump(exclude={"sha256"})
