"""A scenario with a Ray cluster of its own: single replicas are killed, then lose a node. Run as a
script; prints what was seen as one JSON line."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from cache_actors.pool.errors import MemoryUnavailable
from cache_actors.pool.lifecycle import describe_pool, start_pool, stop_pool
from cache_actors.pool.shard_link import PoolInfo
from tests.node_loss import DEADLINE_S, QUICK_HEALTH_CHECKS

NUM_SHARDS = 3


def nodes_after(pool: PoolInfo, gone: set[int]) -> list[str]:
    """Where each shard runs once none is one of the processes that are gone."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            infos = describe_pool(pool, 3.0)
            if not gone & {info.pid for info in infos}:
                return [info.node_id for info in infos]
        except MemoryUnavailable:
            pass
        if time.monotonic() >= deadline:
            raise MemoryUnavailable("the shards did not come back")
        time.sleep(0.05)


def main(home: Path) -> None:
    """Run the scenario."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": False,
            "object_store_memory": 100 << 20,
            "_system_config": QUICK_HEALTH_CHECKS,
        },
    )
    workers = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    pool = start_pool(home, NUM_SHARDS)
    before = nodes_after(pool, set())
    pids = {info.pid for info in describe_pool(pool)}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    killed = nodes_after(pool, pids)
    stop_pool(pool)
    pool = start_pool(home, NUM_SHARDS)
    stopped = nodes_after(pool, set())
    lost = next(info for info in describe_pool(pool) if info.node_id != cluster.head_node.node_id)
    node = next(node for node in workers if node.node_id == lost.node_id)
    cluster.remove_node(node, allow_graceful=False)
    moved = nodes_after(pool, {lost.pid})
    stop_pool(pool)
    ray.shutdown()
    cluster.shutdown()
    report = {
        "nodes": len(set(before)),
        "stayed_after_kills": killed == before,
        "stayed_after_a_stop": stopped == before,
        "left_the_lost_node": lost.node_id not in moved,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
