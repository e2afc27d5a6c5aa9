"""Session-wide test set-up. One Ray cluster serves every test that needs one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A real one-node Ray cluster, started once for the session."""
    import ray

    ray.init(
        num_cpus=16,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=300 << 20,
    )
    yield
    ray.shutdown()
