"""Session-wide test set-up. One Ray cluster serves every test that needs one."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

# Ray and torch read these when they are imported.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# Idle threads of torch spin, which on a machine with few cores slows everything else down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

import pytest
import ray
import torch


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A real one-node Ray cluster, started once for the session."""
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=300 << 20,
    )
    yield
    ray.shutdown()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models this small only lose by waiting for threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def free_port() -> int:
    """A TCP port of this machine that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
