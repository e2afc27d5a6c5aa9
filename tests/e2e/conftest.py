"""Commands on the session's cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from marm_command import marm_json

from app.build import RAY_NAMESPACE


@pytest.fixture
def address(ray_cluster: None) -> Iterator[str]:
    """The session's cluster, on which pools stay between commands until the test is over."""
    yield ray.get_runtime_context().gcs_address
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == RAY_NAMESPACE:
            ray.kill(ray.get_actor(actor["name"], namespace=RAY_NAMESPACE))


@pytest.fixture
def marm(address: str) -> Callable[..., dict[str, Any]]:
    """Runs `marm` there; the JSON that it ends with."""

    def call(*args: str) -> dict[str, Any]:
        return marm_json(*args, "--address", address)

    return call
