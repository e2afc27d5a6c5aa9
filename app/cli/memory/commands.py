"""``marm memory``: everything that is done to the memory of a deployment."""

from __future__ import annotations

import typer

from app.cli.memory.audit import audit_command
from app.cli.memory.convert import convert_command
from app.cli.memory.export import export_command
from app.cli.memory.forget import forget_command
from app.cli.memory.plan import plan_command
from app.cli.memory.rebalance import rebalance_command
from app.cli.memory.rebuild import rebuild_command
from app.cli.memory.snapshot import restore_command, snapshot_command
from app.cli.memory.status import status_command
from app.cli.memory.stop import stop_command

memory_app = typer.Typer(
    help="The memory pool: look at it, move it, copy it, refresh it, and forget users.",
    no_args_is_help=True,
)
memory_app.command("status")(status_command)
memory_app.command("stop")(stop_command)
memory_app.command("plan")(plan_command)
memory_app.command("snapshot")(snapshot_command)
memory_app.command("restore")(restore_command)
memory_app.command("rebalance")(rebalance_command)
memory_app.command("rebuild")(rebuild_command)
memory_app.command("audit")(audit_command)
memory_app.command("convert")(convert_command)
memory_app.command("forget")(forget_command)
memory_app.command("export")(export_command)
