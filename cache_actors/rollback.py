"""Rolling back: which version served before the one that serves now."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from cache_actors.registry import ModelRegistry, ModelRegistryError
from cache_actors.served_versions import served_before

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollback:
    """From the version that serves to the one that served before."""

    from_version: int
    to_version: int


def find_rollback(registry: ModelRegistry, stage: str, variant: str) -> Rollback:
    """The sound version that served before the one that serves now; nothing is changed.

    What serves is the pinned version, else the one that servers noted last, else the newest. Where
    no server has noted anything, the newest older version counts as the one before.

    Raises:
        ModelRegistryError: there is none, or the pin cannot be read.
    """
    published = registry.versions(stage, variant)
    if not published:
        raise ModelRegistryError(
            f"no version of {stage}/{variant} is published; `marm models list` shows what is"
        )
    served = registry.served(stage, variant)
    current = registry.pinned(stage, variant) or (served or published)[-1]
    if served:
        earlier = [version for version in served_before(served, current) if version in published]
    else:
        earlier = [version for version in reversed(published) if version < current]
    for version in earlier:
        try:
            registry.load(stage, variant, version)
        except ModelRegistryError as error:
            logger.warning("not rolling back to version %d: %s", version, error)
            continue
        return Rollback(current, version)
    raise ModelRegistryError(
        f"nothing to roll back to: no sound version of {stage}/{variant} served before version "
        f"{current}; published are {published}, choose with `marm models pin {stage} {variant} "
        "VERSION`"
    )
