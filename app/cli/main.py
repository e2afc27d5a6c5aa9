"""The ``marm`` command."""

from __future__ import annotations

import sys

import typer
from rich.markup import escape

from app.api_keys import KeyFileError
from app.cli.ab import ab_app
from app.cli.audit_serving import audit_app
from app.cli.demo import demo
from app.cli.ingest import ingest_command
from app.cli.keys import keys_app
from app.cli.memory.commands import memory_app
from app.cli.models import models_app
from app.cli.serve import serve_command
from app.cli.session import console
from app.cli.train import train_command
from app.cli.world import world_command
from app.demo import DemoError
from cache_actors.event_log.erase import EraseError
from cache_actors.pool.home_lease import PoolInUseError
from cache_actors.pool.rebalance import RebalanceRunningError
from cache_actors.pool.shard_link import MemoryUnavailable
from cache_actors.registry import ModelRegistryError
from cache_actors.store.errors import MemoryStoreError
from cache_actors.tiers.durable_tier import DurableTierError
from cache_actors.transfer.manifest import SnapshotError
from cache_actors.transfer.storage import StorageError
from train.rebuild.log_job import RebuildError
from train.run import TrainingError

cli_app = typer.Typer(
    help="Memory Augmented Recommendation Model on Ray: ingest a log, train, serve.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
cli_app.command("demo")(demo)
cli_app.command("ingest")(ingest_command)
cli_app.command("world")(world_command)
cli_app.command("train")(train_command)
cli_app.command("serve")(serve_command)
cli_app.add_typer(ab_app, name="ab")
cli_app.add_typer(audit_app, name="audit")
cli_app.add_typer(keys_app, name="keys")
cli_app.add_typer(memory_app, name="memory")
cli_app.add_typer(models_app, name="models")

EXPLAINED = (
    ValueError,
    OSError,
    TrainingError,
    RebuildError,
    DemoError,
    ModelRegistryError,
    MemoryUnavailable,
    MemoryStoreError,
    PoolInUseError,
    RebalanceRunningError,
    DurableTierError,
    EraseError,
    KeyFileError,
    SnapshotError,
    StorageError,
)
"""Errors whose message says what a user can do."""


def cli() -> None:
    """Run a command; what a user can mend ends in one clear line and exit code 1."""
    try:
        cli_app()
    except EXPLAINED as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
