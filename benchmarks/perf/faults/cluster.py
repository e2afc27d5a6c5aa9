"""A real Ray cluster of several nodes on one machine, and a pool on it, both made to be hurt."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.cluster_utils import Cluster

from cache_actors.pool.errors import MemoryUnavailable
from cache_actors.pool.lifecycle import describe_pool
from cache_actors.pool.placement import load_placement
from cache_actors.pool.shard_info import ShardInfo
from cache_actors.pool.shard_link import PoolInfo

HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1_000,
    "health_check_timeout_ms": 1_000,
    "health_check_failure_threshold": 3,
}
"""Ray's own settings take 16 seconds to see that a node is gone."""

_CPUS_PER_NODE = 4
_OBJECT_STORE_BYTES = 128 << 20
_RECOVERY_DEADLINE_S = 90.0
_POLL_S = 0.1

Found = TypeVar("Found")


class FaultError(RuntimeError):
    """The cluster did not recover, so nothing more can be measured."""


@dataclass(frozen=True)
class RunningNodes:
    """A head node, which this process is connected to and nobody kills, and nodes that may die."""

    cluster: Any

    @property
    def head_id(self) -> str:
        """The node of this process."""
        head_id: str = self.cluster.head_node.node_id
        return head_id

    def add(self) -> None:
        """One more node."""
        self.cluster.add_node(num_cpus=_CPUS_PER_NODE, object_store_memory=_OBJECT_STORE_BYTES)

    def lose(self, node_id: str, pool: PoolInfo) -> None:
        """Kill a node at once, with all processes on it and the files that only it had."""
        node = next(node for node in self.cluster.worker_nodes if node.node_id == node_id)
        lost = [info for info in describe_pool(pool) if info.node_id == node_id]
        self.cluster.remove_node(node, allow_graceful=False)
        for info in lost:
            with suppress(ProcessLookupError):
                os.kill(info.pid, signal.SIGKILL)
            # All nodes share this machine's disk: the loss of a node's own disk is this.
            shutil.rmtree(info.path, ignore_errors=True)

    def worker_ids(self) -> list[str]:
        """The nodes that may be killed."""
        return sorted(node.node_id for node in self.cluster.worker_nodes)


@contextmanager
def running_nodes(num_workers: int) -> Iterator[RunningNodes]:
    """A cluster of a head and ``num_workers`` more nodes, gone with the block."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": _CPUS_PER_NODE,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "_system_config": dict(HEALTH_CHECKS),  # Ray adds its own to it
        },
    )
    nodes = RunningNodes(cluster)
    try:
        for _ in range(num_workers):
            nodes.add()
        ray.init(cluster.address, log_to_driver=False, logging_level=logging.WARNING)
        yield nodes
    finally:
        ray.shutdown()
        cluster.shutdown()


def await_whole(pool: PoolInfo, gone_pids: frozenset[int] = frozenset()) -> list[ShardInfo]:
    """Every replica, once all of them run, have every acknowledged row, and none is ``gone``."""

    def look() -> list[ShardInfo] | None:
        with suppress(MemoryUnavailable):
            infos = describe_pool(pool)
            num_shards = load_placement(pool.placement_path).num_shards
            expected = num_shards * pool.config.replicas
            sound = [info for info in infos if info.is_member and info.pid not in gone_pids]
            if len(sound) == expected:
                return infos
        return None

    return await_value(look, f"pool {pool.name!r} is whole again")


def await_value(look: Callable[[], Found | None], what: str) -> Found:
    """What ``look`` gives once it gives something."""
    deadline = time.monotonic() + _RECOVERY_DEADLINE_S
    while True:
        found = look()
        if found is not None:
            return found
        if time.monotonic() >= deadline:
            raise FaultError(f"waited {_RECOVERY_DEADLINE_S:.0f} s in vain until {what}")
        time.sleep(_POLL_S)
