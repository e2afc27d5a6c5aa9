"""Which namespaces a deployment uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cache_actors.registry import ModelRegistry, PublishedModel
from marm.config import ModelConfig
from marm.memory import Namespace


def published_namespaces(registry: ModelRegistry) -> list[Namespace]:
    """Namespaces of the newest ranking models."""
    found = {}
    for newest in _newest_rankers(registry):
        namespace = Namespace(**newest.config["namespace"])
        found[namespace.name] = namespace
    return list(found.values())


def check_convertible(registry: ModelRegistry, source: Namespace, target: Namespace) -> None:
    """Refuse to convert a memory into one that its models could not use.

    Raises:
        ValueError: a newest ranking model that uses ``source`` cannot have ``target`` in its place,
            as sums of errors in int8.
    """
    for newest in _newest_rankers(registry):
        if Namespace(**newest.config["namespace"]) != source or "model" not in newest.config:
            continue
        model = ModelConfig.from_dict(newest.config["model"])
        try:
            replace(model, namespace=target)
        except ValueError as error:
            raise ValueError(
                f"{source.name} is the memory of ranking/{newest.variant} version "
                f"{newest.version}, which could not use {target.name}: {error}"
            ) from error


def _newest_rankers(registry: ModelRegistry) -> Iterator[PublishedModel]:
    for variant in registry.variants("ranking"):
        newest = registry.latest_loadable("ranking", variant)
        if newest is not None:
            yield newest
