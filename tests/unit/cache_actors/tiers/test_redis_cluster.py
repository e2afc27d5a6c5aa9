"""The durable tier on a Redis Cluster: slots, nodes that are gone, and slots that move."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from redis.crc import key_slot
from redis_servers import TestCluster, TestServer, redis_cluster, wait_until
from tier_rows import START_MS, assert_same, user_rows

from cache_actors.tiers.durable_tier import DurableTierUnavailableError
from cache_actors.tiers.redis_keys import RedisKeys
from cache_actors.tiers.redis_server_check import RedisTierError
from cache_actors.tiers.redis_tier import RedisTier
from marm.addressing import NUM_BUCKETS
from marm.memory import Namespace, UserRows

NS = Namespace(depth=2, dim=8)
USERS = list(range(300))


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with redis_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster_tier(cluster: TestCluster, pool_name: str) -> Iterator[RedisTier]:
    tier = RedisTier.connect(cluster.url, pool_name)
    yield tier
    tier.close()


def node_of(cluster: TestCluster, key: str) -> TestServer:
    slot = key_slot(key.encode())
    (owner,) = [
        node
        for node in cluster.nodes
        for first, last, primary, *_ in _slots(node)
        if first <= slot <= last and primary[1] == node.port
    ]
    return owner


def _slots(node: TestServer) -> list:
    with node.client() as client:
        answer: list = client.execute_command("CLUSTER", "SLOTS")
    return answer


def is_back(tier: RedisTier, rows: UserRows) -> bool:
    return not tier.read(NS, rows.user_ids).unavailable.any()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_rows_come_back_across_slots(
    cluster_tier: RedisTier, cluster: TestCluster, pool_name: str, dtype: str
) -> None:
    namespace = Namespace(depth=2, dim=8, dtype=dtype)
    rows = user_rows(namespace, USERS)
    cluster_tier.put(namespace, rows)
    found = cluster_tier.get(namespace, rows.user_ids)
    assert found.rows["event_key"].tolist() == rows.rows["event_key"].tolist()
    assert cluster_tier.put(namespace, found).sent_bytes == 0
    scanned = np.concatenate(list(cluster_tier.scan(namespace, range(NUM_BUCKETS))))
    assert sorted(scanned.tolist()) == USERS
    for node in cluster.nodes:
        with node.client() as client:
            assert len(client.keys(f"marm:{pool_name}:*{{*")) > 50, "no node has nothing"


def test_all_of_a_user_is_in_one_slot() -> None:
    keys = RedisKeys("pool")
    for user in (0, -7, 2**62):
        of_user = [keys.tombstone(user), *keys.blocks("a", np.array([user]))]
        of_user += keys.blocks("b", np.array([user]))
        assert len({key_slot(key.encode()) for key in of_user}) == 1


def test_forget_and_delete_across_slots(cluster_tier: RedisTier) -> None:
    cluster_tier.put(NS, user_rows(NS, USERS))
    assert cluster_tier.forget(5, START_MS + 1000) == 2
    assert cluster_tier.delete(np.arange(10, 20)) == 10
    counts = cluster_tier.get(NS, np.array([5, 6, 10])).counts
    assert counts.tolist() == [3, 5, 0]


def test_users_of_other_nodes_are_served_while_one_hangs(
    cluster: TestCluster, pool_name: str
) -> None:
    tier = RedisTier.connect(f"redis+cluster://{cluster.hosts}?timeout_ms=1000", pool_name)
    rows = user_rows(NS, USERS)
    tier.put(NS, rows)
    before = tier.identity()
    cluster.nodes[1].pause()
    try:
        found = tier.read(NS, rows.user_ids)
        assert 50 < found.unavailable.sum() < 250
        assert (found.rows.counts[~found.unavailable] == 5).all()
        assert (found.rows.counts[found.unavailable] == 0).all()
        assert not tier.stats().available
        with pytest.raises(DurableTierUnavailableError, match="can't be read"):
            tier.get(NS, rows.user_ids)
        with pytest.raises(DurableTierUnavailableError):
            tier.identity()
        write = tier.try_put(NS, user_rows(NS, USERS, 2, first=5))
        assert 0 < write.saved.sum() < len(USERS)
    finally:
        cluster.nodes[1].resume()
    cluster.wait_until_ok()
    wait_until(lambda: is_back(tier, rows), "the node answering again")
    tier.put(NS, user_rows(NS, USERS, 2, first=5))
    assert_same(tier.get(NS, rows.user_ids), user_rows(NS, USERS, 7))
    assert tier.identity() == before, "a node that hung has lost nothing"
    tier.close()


def test_a_node_that_comes_back_empty_changes_the_identity(
    cluster_tier: RedisTier, cluster: TestCluster
) -> None:
    rows = user_rows(NS, USERS)
    cluster_tier.put(NS, rows)
    before = cluster_tier.identity()
    cluster.nodes[2].kill()
    assert cluster_tier.read(NS, rows.user_ids).unavailable.any()
    cluster.nodes[2].restart()
    cluster.wait_until_ok()
    wait_until(lambda: is_back(cluster_tier, rows), "the node answering again")
    assert cluster_tier.identity() != before
    assert 0 < (cluster_tier.get(NS, rows.user_ids).counts == 0).sum() < len(USERS)
    cluster_tier.put(NS, rows)
    assert_same(cluster_tier.get(NS, rows.user_ids), rows)


def test_a_slot_that_moves_is_followed(
    cluster_tier: RedisTier, cluster: TestCluster, pool_name: str
) -> None:
    rows = user_rows(NS, [1, 2, 3])
    cluster_tier.put(NS, rows)
    (key,) = RedisKeys(pool_name).blocks(NS.name, np.array([1]))
    slot = key_slot(key.encode())
    source = node_of(cluster, key)
    target = cluster.nodes[0] if source is not cluster.nodes[0] else cluster.nodes[1]
    with source.client() as old, target.client() as new:
        old_id, new_id = (client.execute_command("CLUSTER", "MYID") for client in (old, new))
        new.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", old_id)
        old.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", new_id)
        assert_same(cluster_tier.get(NS, rows.user_ids), rows)
        old.execute_command("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)
        assert_same(cluster_tier.get(NS, rows.user_ids), rows)
        for keys in iter(lambda: old.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 99), []):
            old.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        for node in cluster.nodes:
            with node.client() as client:
                client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", new_id)
    assert node_of(cluster, key) is target
    assert_same(cluster_tier.get(NS, rows.user_ids), rows)
    cluster_tier.put(NS, user_rows(NS, [1, 2, 3], 2, first=5))
    assert_same(cluster_tier.get(NS, rows.user_ids), user_rows(NS, [1, 2, 3], 7))


def test_a_cluster_node_under_a_plain_url_is_refused(cluster: TestCluster) -> None:
    with pytest.raises(RedisTierError, match=r"node of a Redis Cluster; use redis\+cluster://"):
        RedisTier.connect(cluster.nodes[0].url, "pool")


def test_a_plain_server_under_a_cluster_url_is_refused(session_redis: TestServer) -> None:
    url = f"redis+cluster://127.0.0.1:{session_redis.port}"
    with pytest.raises(RedisTierError, match="not a Redis Cluster; use redis://"):
        RedisTier.connect(url, "pool")


def test_one_reachable_address_is_enough(cluster: TestCluster, free_port: int) -> None:
    tier = RedisTier.connect(f"redis+cluster://127.0.0.1:{free_port},{cluster.hosts}", "pool")
    assert "3 servers" in tier.check()
    tier.close()
