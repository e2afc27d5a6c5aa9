"""Which namespaces a deployment uses."""

from __future__ import annotations

from cache_actors.registry import ModelRegistry
from marm.memory import Namespace


def published_namespaces(registry: ModelRegistry) -> list[Namespace]:
    """Namespaces of the newest ranking models."""
    found = {}
    for variant in registry.variants("ranking"):
        newest = registry.latest_loadable("ranking", variant)
        if newest is not None:
            namespace = Namespace(**newest.config["namespace"])
            found[namespace.name] = namespace
    return list(found.values())
