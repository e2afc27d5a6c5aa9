"""A store that was lost is filled again from a real Redis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from redis_servers import TestServer, redis_server
from tier_rows import START_MS, assert_same, row_owner, user_rows

from cache_actors.store.limits import StoreLimits
from cache_actors.store.shard_store import ShardStore
from cache_actors.tiers.durable_tier import DurableTierUnavailableError
from cache_actors.tiers.redis_keys import RedisKeys
from cache_actors.tiers.redis_tier import RedisTier
from cache_actors.tiers.warm_up import load_from_tier
from cache_actors.tiers.write_behind import WriteBehind
from marm.addressing import NUM_BUCKETS, user_bucket
from marm.memory import Namespace

NS = Namespace(depth=2, dim=8)
WIDE = Namespace(depth=4, dim=64)
USERS = np.arange(300)
ALL = range(NUM_BUCKETS)


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[ShardStore]:
    store = ShardStore(tmp_path / "fresh")
    yield store
    store.close()


def test_a_lost_store_is_filled_again(tmp_path: Path, tier: RedisTier, fresh: ShardStore) -> None:
    lost = ShardStore(tmp_path / "lost")
    behind = WriteBehind(lost, tier)
    namespaces = [Namespace(depth=2, dim=8, dtype=dtype) for dtype in ("float16", "int8")]
    for namespace in namespaces:
        rows = user_rows(namespace, USERS.tolist())
        lost.save(namespace, row_owner(rows), rows.rows)
    lost.forget(5, START_MS + 2000)
    tier.forget(5, START_MS + 2000)
    behind.flush(60)
    loaded = load_from_tier(fresh, tier, tier.namespaces(), ALL)
    assert loaded.is_complete
    assert (loaded.users, loaded.rows) == (600, 2 * (5 * 299 + 2))
    for namespace in namespaces:
        assert_same(fresh.open(namespace).fetch(USERS, 100), lost.open(namespace).fetch(USERS, 100))
    late = user_rows(NS, [5])
    fresh.save(NS, row_owner(late), late.rows)
    assert fresh.open(NS).fetch(np.array([5]), 100).counts.tolist() == [2], "still forgotten"
    again = load_from_tier(fresh, tier, tier.namespaces(), ALL)
    assert again == loaded, "repeating it changes nothing"
    lost.close()


def test_only_the_buckets_asked_for_are_loaded(tier: RedisTier, fresh: ShardStore) -> None:
    tier.put(NS, user_rows(NS, USERS.tolist()))
    tier.forget(int(USERS[user_bucket(USERS) >= 128][0]), START_MS)
    load_from_tier(fresh, tier, [NS], range(128))
    mine = user_bucket(USERS) < 128
    assert (fresh.open(NS).fetch(USERS, 100).counts == 5 * mine).all()
    assert fresh.forgotten() == {}


def test_the_newest_users_are_loaded_within_the_budget(tmp_path: Path, tier: RedisTier) -> None:
    num_users = 1000
    for first in range(0, num_users, 100):
        tier.put(WIDE, user_rows(WIDE, range(first, first + 100), 20, first=first))
    store = ShardStore(tmp_path / "small", limits=StoreLimits(max_bytes=8 << 20))
    loaded = load_from_tier(store, tier, [WIDE], ALL)
    assert not loaded.is_complete
    assert 100 < loaded.users < num_users
    counters = store.stats().namespaces[WIDE.name].counters
    assert counters.evicted_users == 0, "nothing that was loaded had to go again"
    counts = store.open(WIDE).fetch(np.arange(num_users), 100).counts
    assert (counts[-100:] == 20).all()
    assert (counts[:100] == 0).all()
    store.close()


def test_a_quota_bounds_its_namespace_only(tmp_path: Path, tier: RedisTier) -> None:
    other = Namespace(depth=2, dim=8, epoch=1)
    tier.put(WIDE, user_rows(WIDE, range(600), 20))
    tier.put(other, user_rows(other, range(600), 5))
    limits = StoreLimits(namespace_bytes=((WIDE.name, 4 << 20),))
    store = ShardStore(tmp_path / "small", limits=limits)
    loaded = load_from_tier(store, tier, [WIDE, other], ALL)
    assert not loaded.is_complete
    everybody = np.arange(600)
    assert (store.open(other).fetch(everybody, 100).counts == 5).all()
    assert 0 < np.count_nonzero(store.open(WIDE).fetch(everybody, 100).counts) < 600
    store.close()


def test_rows_saved_meanwhile_win_and_stay_flagged(tier: RedisTier, fresh: ShardStore) -> None:
    tier.put(NS, user_rows(NS, [1, 2], 6, step=1))
    behind = WriteBehind(fresh, tier)
    newer = user_rows(NS, [1], 4, first=4, step=2)
    fresh.save(NS, row_owner(newer), newer.rows)
    load_from_tier(fresh, tier, [NS], ALL)
    found = fresh.open(NS).fetch(np.array([1]), 100)
    assert found.rows["written_step"].tolist() == [1] * 4 + [2] * 4
    assert behind.stats().backlog_users == 1
    behind.flush(60)
    assert_same(tier.get(NS, np.array([1])), found)


def test_users_saved_before_they_were_loaded_lose_no_older_rows(
    tier: RedisTier, fresh: ShardStore
) -> None:
    tier.put(NS, user_rows(NS, [1], 6))
    behind = WriteBehind(fresh, tier)
    newer = user_rows(NS, [1], 2, first=6)
    fresh.save(NS, row_owner(newer), newer.rows)
    behind.flush(60)
    load_from_tier(fresh, tier, [NS], ALL)
    assert_same(fresh.open(NS).fetch(np.array([1]), 100), user_rows(NS, [1], 8))


def test_damaged_blocks_are_counted_and_left_out(
    tier: RedisTier, fresh: ShardStore, session_redis: TestServer, pool_name: str
) -> None:
    tier.put(NS, user_rows(NS, [1, 2, 3]))
    (key,) = RedisKeys(pool_name).blocks(NS.name, np.array([2]))
    with session_redis.client() as client:
        client.setrange(key, 100, b"\xff\xff")
    loaded = load_from_tier(fresh, tier, [NS], ALL)
    assert (loaded.users, loaded.damaged_users, loaded.is_complete) == (2, 1, True)
    assert fresh.open(NS).fetch(np.array([1, 2, 3]), 9).counts.tolist() == [5, 0, 5]


def test_a_tier_that_is_down_is_an_error(fresh: ShardStore, pool_name: str) -> None:
    with redis_server() as server:
        tier = RedisTier.connect(server.url, pool_name)
        tier.put(NS, user_rows(NS, [1]))
        server.kill()
        with pytest.raises(DurableTierUnavailableError):
            load_from_tier(fresh, tier, [NS], ALL)
        tier.close()
