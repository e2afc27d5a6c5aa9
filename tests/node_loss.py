"""A scenario with a Ray cluster of its own: a node is lost under load. Run as a script; prints
what was seen as one JSON line."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import ray
from ray.cluster_utils import Cluster

from cache_actors.pool.client import MemoryClient
from cache_actors.pool.config import PoolConfig
from cache_actors.pool.errors import MemoryUnavailable
from cache_actors.pool.lifecycle import describe_pool, start_pool, stop_pool
from cache_actors.pool.shard_info import ShardInfo
from cache_actors.pool.shard_link import PoolInfo
from marm.memory import Namespace

NAMESPACE = Namespace(dim=8)
NUM_USERS = 60
USERS = np.arange(NUM_USERS)
DEADLINE_S = 90.0
QUICK_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


def make_rows(count: int, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows ``start..start + count`` of a fixed log of events."""
    index = np.arange(start, start + count)
    rows = np.zeros(count, NAMESPACE.row_dtype)
    rows["timestamp_ms"] = index
    rows["event_key"] = index
    rows["written_step"] = 1
    rows["memory"] = 1
    return index * 7 % NUM_USERS, rows


def members(pool: PoolInfo) -> list[ShardInfo]:
    """The replicas that run and are up to date; none while one does not answer."""
    try:
        return [info for info in describe_pool(pool, 3.0) if info.is_member]
    except MemoryUnavailable:
        return []


def lose_a_node(cluster: Cluster, nodes: list, pool: PoolInfo) -> dict[str, object]:
    """Read and write while a node with replicas of both shards is lost and they are made anew."""
    unavailable = missing_rows = 0
    num_rows = 2000
    before = {(info.shard, info.replica): info for info in members(pool)}
    lost = next(node for node in nodes if any(i.node_id == node.node_id for i in before.values()))
    with MemoryClient(pool, NAMESPACE) as client:
        client.save(*make_rows(num_rows, 0)).wait(DEADLINE_S)
        cluster.remove_node(lost, allow_graceful=False)
        deadline = time.monotonic() + DEADLINE_S
        now: list[ShardInfo] = []
        while time.monotonic() < deadline:
            found, missing = client.fetch_available(USERS, 10**6)
            unavailable += int(missing.sum())
            missing_rows += num_rows - len(found.rows)
            client.save(*make_rows(100, num_rows)).wait(DEADLINE_S)
            num_rows += 100
            now = members(pool)
            if len(now) == len(before) and all(i.node_id != lost.node_id for i in now):
                break
        rows_at_the_end = len(client.fetch(USERS, 10**6).rows)
    return {
        "lost_replicas": sum(info.node_id == lost.node_id for info in before.values()),
        "unavailable_users": unavailable,
        "missing_rows": missing_rows + num_rows - rows_at_the_end,
        "members": len(now),
        "nodes_by_shard": [len({i.node_id for i in now if i.shard == s}) for s in range(2)],
    }


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
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    pool = start_pool(home, 2, config=PoolConfig(replicas=2))
    report = lose_a_node(cluster, nodes, pool)
    stop_pool(pool)
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
