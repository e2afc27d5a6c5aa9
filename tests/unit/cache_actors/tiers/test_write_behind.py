"""A store's changes reach a real Redis, also after it was gone, and evicted rows are not lost."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from redis_servers import TestServer, redis_cluster, redis_server, wait_until
from tier_rows import START_MS, assert_same, row_owner, user_rows

from cache_actors.store.limits import StoreLimits
from cache_actors.store.shard_store import ShardStore
from cache_actors.tiers.durable_tier import DurableTierUnavailableError
from cache_actors.tiers.redis_keys import RedisKeys
from cache_actors.tiers.redis_tier import RedisTier
from cache_actors.tiers.resync import leave_tier
from cache_actors.tiers.write_behind import WriteBehind
from marm.memory import Namespace, UserRows

NS = Namespace(depth=2, dim=8)
WIDE = Namespace(depth=4, dim=64)
USERS = np.arange(200)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ShardStore]:
    store = ShardStore(tmp_path / "shard")
    yield store
    store.close()


@pytest.fixture
def own_redis() -> Iterator[TestServer]:
    """A server of the test's own, to be ended and started."""
    with redis_server() as server:
        yield server


def save(store: ShardStore, rows: UserRows, namespace: Namespace = NS) -> None:
    store.save(namespace, row_owner(rows), rows.rows)


def test_changes_are_saved_once(store: ShardStore, tier: RedisTier) -> None:
    behind = WriteBehind(store, tier)
    rows = user_rows(NS, USERS.tolist())
    save(store, rows)
    assert behind.stats().backlog_users == len(USERS)
    behind.flush(60)
    assert_same(tier.get(NS, USERS), rows)
    stats = behind.stats()
    assert (stats.backlog_users, stats.oldest_unsaved_s, stats.errors) == (0, 0.0, 0)
    assert stats.saved_users == len(USERS)
    behind.flush(60)
    assert behind.stats() == stats, "nothing is left to do"
    save(store, user_rows(NS, [7], 2, first=5))
    behind.flush(60)
    assert behind.stats().saved_users == len(USERS) + 1
    assert len(tier.get(NS, np.array([7])).rows) == 7


def test_all_namespaces_are_saved(store: ShardStore, tier: RedisTier) -> None:
    namespaces = [Namespace(depth=2, dim=8, dtype=dtype) for dtype in ("float32", "int8")]
    behind = WriteBehind(store, tier, max_users_per_round=16)
    for namespace in namespaces:
        save(store, user_rows(namespace, USERS.tolist()), namespace)
    behind.flush(60)
    for namespace in namespaces:
        assert_same(tier.get(namespace, USERS), store.open(namespace).fetch(USERS, 100))


def test_the_thread_saves_while_rows_come_in(store: ShardStore, tier: RedisTier) -> None:
    behind = WriteBehind(store, tier, interval_s=0.01)
    behind.start()
    for first in range(20):
        save(store, user_rows(NS, USERS.tolist(), 1, first=first))
    wait_until(lambda: behind.stats().backlog_users == 0, "saving everything")
    behind.close()
    assert_same(tier.get(NS, USERS), user_rows(NS, USERS.tolist(), 20))
    assert behind.stats().errors == 0
    with pytest.raises(RuntimeError, match="runs already"):
        behind.start()


def test_a_change_during_a_put_is_not_taken_for_saved(store: ShardStore, tier: RedisTier) -> None:
    behind = WriteBehind(store, tier)
    save(store, user_rows(NS, [1, 2]))
    waiting = store.open(NS).unsaved(10)
    save(store, user_rows(NS, [1], 1, first=5))
    store.mark_saved(NS, waiting.rows.user_ids, waiting.versions)
    assert behind.stats().backlog_users == 1
    behind.flush(60)
    assert len(tier.get(NS, np.array([1])).rows) == 6


def test_the_backlog_survives_the_shard(tmp_path: Path, tier: RedisTier) -> None:
    store = ShardStore(tmp_path / "shard")
    WriteBehind(store, tier)
    save(store, user_rows(NS, USERS.tolist()))
    store.close()
    store = ShardStore(tmp_path / "shard")
    behind = WriteBehind(store, tier)
    assert behind.stats().backlog_users == len(USERS)
    behind.flush(60)
    assert_same(tier.get(NS, USERS), user_rows(NS, USERS.tolist()))
    store.close()


def test_an_outage_is_caught_up_with(
    store: ShardStore, own_redis: TestServer, pool_name: str
) -> None:
    tier = RedisTier.connect(own_redis.url, pool_name)
    behind = WriteBehind(store, tier, interval_s=0.01)
    behind.start()
    save(store, user_rows(NS, USERS.tolist()))
    wait_until(lambda: behind.stats().backlog_users == 0, "saving everything")
    own_redis.kill()
    save(store, user_rows(NS, [1, 2, 500], 3, first=5))
    wait_until(lambda: behind.stats().errors > 3, "rounds that fail")
    stats = behind.stats()
    assert stats.backlog_users == 3
    assert stats.oldest_unsaved_s > 0
    assert stats.last_error
    with pytest.raises(DurableTierUnavailableError, match="3 users are not in the durable tier"):
        behind.flush(0.05)
    own_redis.restart()
    # The server is empty now: what was saved before it went down has to be saved again too.
    behind.flush(60)
    assert_same(tier.get(NS, USERS), store.open(NS).fetch(USERS, 100))
    assert len(tier.get(NS, np.array([500])).rows) == 3
    assert behind.stats().last_error == ""
    behind.close()
    tier.close()


def test_a_redis_that_was_emptied_is_filled_again(
    store: ShardStore, own_redis: TestServer, pool_name: str
) -> None:
    tier = RedisTier.connect(own_redis.url, pool_name)
    behind = WriteBehind(store, tier)
    rows = user_rows(NS, USERS.tolist())
    save(store, rows)
    store.forget(3, START_MS + 1000)
    behind.flush(60)
    with own_redis.client() as client:
        client.flushall()
    behind.flush(60)
    found = tier.get(NS, USERS)
    assert_same(found, store.open(NS).fetch(USERS, 100))
    assert found.counts[3] == 3
    assert tier.forgotten() == {3: START_MS + 1000}
    tier.close()


def test_comparing_sends_only_what_is_missing(
    store: ShardStore, tier: RedisTier, session_redis: TestServer, pool_name: str
) -> None:
    behind = WriteBehind(store, tier, max_users_per_round=32)
    save(store, user_rows(NS, USERS.tolist()))
    behind.flush(60)
    keys = RedisKeys(pool_name)
    with session_redis.client() as client:
        client.delete(keys.synced, *keys.blocks(NS.name, USERS[:5]))
    before = tier.stats()
    rounds = 0
    while not behind.run_round():
        rounds += 1
        assert behind.stats().resync_steps > 0
    assert rounds >= len(USERS) // 32 - 1, "not all in one round"
    assert behind.stats().resync_steps == 0
    assert len(tier.get(NS, USERS).rows) == 5 * len(USERS)
    block_bytes = before.written_bytes / len(USERS)
    assert tier.stats().written_bytes - before.written_bytes == 5 * block_bytes


def test_a_time_without_a_tier_is_made_up_for(tmp_path: Path, tier: RedisTier) -> None:
    """Changes of that time are not flagged."""
    store = ShardStore(tmp_path / "shard")
    WriteBehind(store, tier).flush(60)
    store.close()
    store = ShardStore(tmp_path / "shard")
    leave_tier(store.directory)
    save(store, user_rows(NS, USERS.tolist()))
    store.close()
    store = ShardStore(tmp_path / "shard")
    WriteBehind(store, tier).flush(60)
    assert_same(tier.get(NS, USERS), user_rows(NS, USERS.tolist()))
    store.close()


def test_rows_of_a_snapshot_are_saved_when_asked_for(store: ShardStore, tier: RedisTier) -> None:
    behind = WriteBehind(store, tier)
    behind.flush(60)
    store.restore(NS, user_rows(NS, USERS.tolist()))
    behind.flush(60)
    assert len(tier.get(NS, USERS).rows) == 0, "restored rows are taken for saved"
    behind.compare_all()
    behind.flush(60)
    assert_same(tier.get(NS, USERS), user_rows(NS, USERS.tolist()))


def test_evicted_rows_are_in_the_tier_and_newer_ones_join_them(
    store: ShardStore, tier: RedisTier
) -> None:
    behind = WriteBehind(store, tier)
    save(store, user_rows(NS, [1, 2], 8))
    behind.flush(60)
    store.evict(NS, np.array([1]))
    save(store, user_rows(NS, [1], 2, first=8))
    behind.flush(60)
    assert_same(tier.get(NS, np.array([1])), user_rows(NS, [1], 10))
    store.restore(NS, tier.get(NS, np.array([1])))
    assert_same(store.open(NS).fetch(np.array([1]), 100), user_rows(NS, [1], 10))


def test_nothing_is_lost_under_a_byte_budget(tmp_path: Path, tier: RedisTier) -> None:
    """Users are evicted before any round of write-behind: they go to the tier first."""
    store = ShardStore(tmp_path / "shard", limits=StoreLimits(max_bytes=8 << 20))
    behind = WriteBehind(store, tier)
    for first in range(0, 2000, 50):
        save(store, user_rows(WIDE, range(first, first + 50), 20), WIDE)
    assert store.stats().namespaces[WIDE.name].counters.evicted_unsaved == 0
    behind.flush(60)
    everybody = np.arange(2000)
    assert_same(tier.get(WIDE, everybody), user_rows(WIDE, everybody.tolist(), 20))
    store.close()


def test_an_evicted_version_is_never_overwritten_by_an_older_one(
    tmp_path: Path, tier: RedisTier
) -> None:
    """A round has taken rows when they change, and are evicted, before it puts them."""
    store = ShardStore(tmp_path / "shard")
    behind = WriteBehind(store, tier, interval_s=0.001)
    behind.start()
    for step in range(30):
        save(store, user_rows(NS, range(50), 5, step=step))
        assert store.evict_to is not None
        store.evict_to(NS, store.open(NS).fetch(np.arange(50), 100))
        store.evict(NS, np.arange(50))
    behind.close()
    assert (tier.get(NS, np.arange(50)).rows["written_step"] == 29).all()
    store.close()


def test_a_full_redis_keeps_the_backlog(store: ShardStore, pool_name: str) -> None:
    with redis_server("--maxmemory", "4mb", "--maxmemory-policy", "noeviction") as server:
        tier = RedisTier.connect(server.url, pool_name)
        behind = WriteBehind(store, tier)
        save(store, user_rows(WIDE, range(300), 50), WIDE)
        with pytest.raises(DurableTierUnavailableError, match="flagged"):
            behind.flush(1)
        assert behind.stats().backlog_users > 0
        with server.client() as client:
            client.config_set("maxmemory", "1gb")
        behind.flush(60)
        everybody = np.arange(300)
        assert_same(tier.get(WIDE, everybody), user_rows(WIDE, everybody.tolist(), 50))
        tier.close()


def test_users_of_live_cluster_nodes_get_their_turn(store: ShardStore, pool_name: str) -> None:
    """Even if those of a dead node wait longer, and fill a batch."""
    with redis_cluster() as cluster:
        tier = RedisTier.connect(cluster.url, pool_name)
        behind = WriteBehind(store, tier, max_users_per_round=16)
        save(store, user_rows(NS, range(300)))
        behind.flush(60)
        cluster.nodes[0].kill()
        unreachable = tier.read(NS, np.arange(300)).unavailable
        dead = np.flatnonzero(unreachable)[:40].tolist()
        live = np.flatnonzero(~unreachable)[:40].tolist()
        save(store, user_rows(NS, dead, 1, first=5))
        save(store, user_rows(NS, live, 1, first=5))
        assert not behind.run_round()
        assert (tier.get(NS, np.array(live)).counts == 6).all()
        cluster.nodes[0].restart()
        cluster.wait_until_ok()
        behind.flush(60)
        assert_same(tier.get(NS, np.arange(300)), store.open(NS).fetch(np.arange(300), 100))
        tier.close()


def test_a_forgotten_user_stays_forgotten_while_it_is_saved(
    store: ShardStore, tier: RedisTier
) -> None:
    behind = WriteBehind(store, tier, interval_s=0.001)
    behind.start()
    stop = threading.Event()

    def keep_saving() -> None:
        for step in itertools.count():
            save(store, user_rows(NS, range(20), 5, step=step))
            if stop.is_set():
                return

    writer = threading.Thread(target=keep_saving)
    writer.start()
    wait_until(lambda: behind.stats().saved_users > 100, "some saves")
    for user in range(10):
        store.forget(user, START_MS + 3000)
        tier.forget(user, START_MS + 3000)
    wait_until(lambda: behind.stats().saved_users > 200, "some saves")
    stop.set()
    writer.join()
    behind.flush(60)
    behind.close()
    assert tier.get(NS, np.arange(20)).counts.tolist() == [1] * 10 + [5] * 10


def test_settings_are_checked(store: ShardStore, tier: RedisTier) -> None:
    with pytest.raises(ValueError, match="interval_s > 0"):
        WriteBehind(store, tier, interval_s=0)
