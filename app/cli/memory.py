"""``marm memory``: what the memory of a deployment holds."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from app.build import RAY_NAMESPACE
from app.cli.options import DEFAULT_HOME, AddressOption, HomeOption
from app.cli.session import ray_session
from cache_actors.pool.client import MemoryClient
from cache_actors.home import Home
from cache_actors.pool.lifecycle import start_pool
from cache_actors.registry import ModelRegistry
from marm.memory import Namespace

memory_app = typer.Typer(help="The memory pool.", no_args_is_help=True)


@memory_app.callback()
def _memory() -> None:
    """The memory pool."""


@memory_app.command()
def status(home: HomeOption = DEFAULT_HOME, address: AddressOption = None) -> None:
    """Users, rows and bytes per shard, for every namespace that a published model uses (JSON)."""
    target = Home(home)
    namespaces = published_namespaces(ModelRegistry(target.models))
    with ray_session(address):
        pool = start_pool(target, None, RAY_NAMESPACE)
        for namespace in namespaces:
            with MemoryClient(pool, namespace) as memory:
                held = [asdict(shard) for shard in memory.stats().shards]
            typer.echo(json.dumps({"namespace": namespace.name, "shards": held}))


def published_namespaces(registry: ModelRegistry) -> list[Namespace]:
    """Namespaces of the newest ranking models."""
    found = {}
    for variant in registry.variants("ranking"):
        newest = registry.latest_loadable("ranking", variant)
        if newest is not None:
            namespace = Namespace(**newest.config["namespace"])
            found[namespace.name] = namespace
    return list(found.values())
