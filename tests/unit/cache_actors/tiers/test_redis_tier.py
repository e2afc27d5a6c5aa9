"""Rows in a real Redis: what is put comes back, never gives way to less, and can be forgotten."""

from __future__ import annotations

import numpy as np
import pytest
from redis_servers import TestServer
from tier_rows import START_MS, assert_same, user_rows

from cache_actors.store.row_formats import as_read
from cache_actors.tiers.redis_keys import RedisKeys
from cache_actors.tiers.redis_tier import RedisTier
from cache_actors.tiers.user_index import PAGE_USERS
from marm.addressing import NUM_BUCKETS, user_bucket
from marm.memory import Namespace, UserRows

NS = Namespace(depth=2, dim=8)
ALL = range(NUM_BUCKETS)


def ids(*users: int) -> np.ndarray:
    return np.array(users, np.int64)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("depth", [0, 3])
def test_rows_come_back(tier: RedisTier, dtype: str, depth: int) -> None:
    namespace = Namespace(depth=depth, dim=8, dtype=dtype)
    rows = user_rows(namespace, [3, -1, 2**62, *range(10, 400)], 6)
    write = tier.put(namespace, rows)
    assert write.saved.all()
    expected = UserRows(rows.user_ids, rows.offsets, as_read(namespace, rows.rows))
    assert_same(tier.get(namespace, rows.user_ids), expected)
    assert tier.put(namespace, expected).sent_bytes == 0, "what is there is not sent again"


def test_absent_users_have_no_rows(tier: RedisTier) -> None:
    tier.put(NS, user_rows(NS, [1]))
    found = tier.read(NS, ids(7, 1, 8))
    assert found.rows.counts.tolist() == [0, 5, 0]
    assert not found.damaged.any()
    assert not found.unavailable.any()
    assert len(tier.get(NS, ids()).rows) == 0
    assert tier.stats().hits == 1
    assert tier.stats().misses == 2


def test_users_without_rows_are_not_stored(tier: RedisTier) -> None:
    assert tier.put(NS, user_rows(NS, [1, 2], 0)).saved.all()
    assert list(tier.scan(NS, ALL)) == []


def test_namespaces_and_pools_do_not_mix(tier: RedisTier, session_redis: TestServer) -> None:
    other = Namespace(depth=2, dim=8, epoch=1)
    tier.put(NS, user_rows(NS, [1]))
    tier.put(other, user_rows(other, [1], 2))
    assert len(tier.get(NS, ids(1)).rows) == 5
    assert len(tier.get(other, ids(1)).rows) == 2
    assert tier.namespaces() == [NS, other]
    elsewhere = RedisTier.connect(session_redis.url, "another {pool}: /x")
    assert len(elsewhere.get(NS, ids(1)).rows) == 0
    elsewhere.close()


def test_newer_rows_are_added_to_older_ones_the_writer_no_longer_has(tier: RedisTier) -> None:
    tier.put(NS, user_rows(NS, [1], 10))
    tier.put(NS, user_rows(NS, [1], 4, first=10))
    assert_same(tier.get(NS, ids(1)), both := user_rows(NS, [1], 14))
    tier.put(NS, user_rows(NS, [1], 3, first=2))
    assert len(tier.get(NS, ids(1)).rows) == len(both.rows)


def test_a_newer_version_of_rows_takes_their_place(tier: RedisTier) -> None:
    tier.put(NS, user_rows(NS, [1], 10, step=1))
    newer = user_rows(NS, [1], 12, step=2)
    tier.put(NS, newer)
    assert_same(tier.get(NS, ids(1)), newer)


def test_a_raw_row_never_erases_a_computed_one(tier: RedisTier) -> None:
    computed = user_rows(NS, [1], 6)
    tier.put(NS, computed)
    tier.put(NS, user_rows(NS, [1], 6, step=-1))
    assert_same(tier.get(NS, ids(1)), computed)


def test_no_more_rows_than_the_limit_are_kept(session_redis: TestServer, pool_name: str) -> None:
    tier = RedisTier.connect(session_redis.url, pool_name, max_rows_per_user=8)
    tier.put(NS, user_rows(NS, [1], 8))
    tier.put(NS, user_rows(NS, [1], 8, first=5))
    assert_same(tier.get(NS, ids(1)), user_rows(NS, [1], 8, first=5))
    tier.close()


def test_a_time_to_live_is_set(session_redis: TestServer, pool_name: str) -> None:
    tier = RedisTier.connect(session_redis.url, pool_name, ttl_s=1000)
    tier.put(NS, user_rows(NS, [1]))
    (key,) = RedisKeys(pool_name).blocks(NS.name, ids(1))
    with session_redis.client() as client:
        assert 0 < client.pttl(key) <= 1_000_000
    tier.close()


def test_forgotten_rows_go_and_stay_away(tier: RedisTier) -> None:
    other = Namespace(depth=1, dim=4)
    tier.put(NS, user_rows(NS, [1, 2], 10))
    tier.put(other, user_rows(other, [1], 3))
    assert tier.forget(1, START_MS + 5000) == 6 + 3
    assert_same(tier.get(NS, ids(1)), user_rows(NS, [1], 4, first=6))
    assert len(tier.get(other, ids(1)).rows) == 0
    tier.put(NS, user_rows(NS, [1], 12))
    assert tier.get(NS, ids(1)).rows["timestamp_ms"].min() == START_MS + 6000
    assert len(tier.get(NS, ids(2)).rows) == 10
    assert tier.forgotten() == {1: START_MS + 5000}
    assert tier.forget(1, START_MS) == 0
    assert tier.forgotten() == {1: START_MS + 5000}, "an earlier time takes nothing back"


def test_forgetting_everything_leaves_no_block_and_no_entry(
    tier: RedisTier, session_redis: TestServer, pool_name: str
) -> None:
    tier.put(NS, user_rows(NS, [1]))
    assert tier.forget(1, 2**62) == 5
    assert tier.put(NS, user_rows(NS, [1])).sent_bytes == 0
    assert list(tier.scan(NS, ALL)) == []
    (key,) = RedisKeys(pool_name).blocks(NS.name, ids(1))
    with session_redis.client() as client:
        assert not client.exists(key)


def test_a_block_from_before_a_forget_is_not_read(
    tier: RedisTier, session_redis: TestServer, pool_name: str
) -> None:
    """As after a Redis was restored from an old copy of its file."""
    tier.put(NS, user_rows(NS, [1]))
    (key,) = RedisKeys(pool_name).blocks(NS.name, ids(1))
    with session_redis.client() as client:
        old = client.get(key)
        tier.forget(1, 2**62)
        client.set(key, old)
    assert len(tier.get(NS, ids(1)).rows) == 0
    assert tier.stats().forgotten_rows == 5


def test_delete_removes_users_from_all_namespaces(tier: RedisTier) -> None:
    other = Namespace(depth=1, dim=4)
    tier.put(NS, user_rows(NS, [1, 2, 3]))
    tier.put(other, user_rows(other, [1]))
    assert tier.delete(ids(1, 2, 99)) == 3
    assert tier.get(NS, ids(1, 2, 3)).counts.tolist() == [0, 0, 5]
    assert np.concatenate(list(tier.scan(NS, ALL))).tolist() == [3]


def test_drop_removes_buckets_of_one_namespace(tier: RedisTier) -> None:
    other = Namespace(depth=1, dim=4)
    users = list(range(300))
    tier.put(NS, user_rows(NS, users, 1))
    tier.put(other, user_rows(other, users, 1))
    buckets = list(range(100))
    mine = np.isin(user_bucket(users), buckets)
    assert tier.drop(NS, buckets) == mine.sum()
    assert (tier.get(NS, np.array(users)).counts == ~mine).all()
    assert (tier.get(other, np.array(users)).counts == 1).all()


def test_scan_gives_every_user_of_the_buckets_newest_first(tier: RedisTier) -> None:
    users = np.arange(1500)
    newest = {}
    for age in range(5):
        part = users[age::5]
        tier.put(NS, user_rows(NS, part.tolist(), 2, first=age * 10))
        newest |= dict.fromkeys(part.tolist(), age)
    pages = list(tier.scan(NS, ALL))
    assert max(map(len, pages)) <= 256
    found = np.concatenate(pages).tolist()
    assert sorted(found) == users.tolist()
    ages = [newest[user] for user in found]
    assert ages == sorted(ages, reverse=True)
    some = np.concatenate(list(tier.scan(NS, range(40)))).tolist()
    assert sorted(some) == users[user_bucket(users) < 40].tolist()


def test_scan_of_more_users_of_one_time_than_a_page_has(tier: RedisTier) -> None:
    candidates = np.arange(200_000)
    users = candidates[user_bucket(candidates) == 7]
    assert len(users) > 2 * PAGE_USERS
    tier.put(NS, user_rows(NS, users.tolist(), 1))
    found = np.concatenate(list(tier.scan(NS, [7]))).tolist()
    assert sorted(found) == users.tolist()


@pytest.mark.parametrize("position", [0, 20, 60, -1])
def test_a_damaged_block_is_dropped_counted_and_repaired_by_the_next_put(
    tier: RedisTier, session_redis: TestServer, pool_name: str, position: int
) -> None:
    rows = user_rows(NS, [1, 2])
    tier.put(NS, rows)
    (key,) = RedisKeys(pool_name).blocks(NS.name, ids(1))
    with session_redis.client() as client:
        damaged = bytearray(client.get(key))
        damaged[position] ^= 0xFF
        client.set(key, bytes(damaged))
    found = tier.read(NS, ids(1, 2))
    assert found.damaged.tolist() == [True, False]
    assert found.rows.counts.tolist() == [0, 5]
    assert tier.stats().damaged_blocks == 1
    tier.put(NS, rows)
    assert_same(tier.get(NS, ids(1, 2)), rows)


@pytest.mark.parametrize("foreign", ["text", "list"])
def test_values_of_somebody_else_are_replaced_and_never_returned(
    tier: RedisTier, session_redis: TestServer, pool_name: str, foreign: str
) -> None:
    (key,) = RedisKeys(pool_name).blocks(NS.name, ids(1))
    with session_redis.client() as client:
        if foreign == "text":
            client.set(key, "not a block of rows")
        else:
            client.rpush(key, 1, 2, 3)
    assert len(tier.get(NS, ids(1)).rows) == 0
    tier.put(NS, user_rows(NS, [1]))
    assert_same(tier.get(NS, ids(1)), user_rows(NS, [1]))
    assert tier.stats().damaged_blocks >= 1


def test_forget_removes_a_damaged_block(
    tier: RedisTier, session_redis: TestServer, pool_name: str
) -> None:
    tier.put(NS, user_rows(NS, [1]))
    (key,) = RedisKeys(pool_name).blocks(NS.name, ids(1))
    with session_redis.client() as client:
        client.set(key, client.get(key)[:-3])
        tier.forget(1, START_MS)
        assert not client.exists(key)


def test_two_writers_of_one_user_lose_nothing(
    tier: RedisTier, session_redis: TestServer, pool_name: str
) -> None:
    """Each finds another block than it last saw, again and again."""
    other = RedisTier.connect(session_redis.url, pool_name)
    for first in range(0, 20, 2):
        tier.put(NS, user_rows(NS, [1], 1, first=first))
        other.put(NS, user_rows(NS, [1], 1, first=first + 1))
    assert_same(tier.get(NS, ids(1)), user_rows(NS, [1], 20))
    other.close()


def test_synced_identity_is_kept_per_store(tier: RedisTier) -> None:
    assert tier.synced_identity("store-1") is None
    tier.set_synced("store-1", tier.identity())
    assert tier.synced_identity("store-1") == tier.identity()
    assert tier.synced_identity("store-2") is None


def test_rows_of_another_layout_are_refused_and_change_nothing(tier: RedisTier) -> None:
    with pytest.raises(ValueError, match="row_dtype"):
        tier.put(NS, user_rows(Namespace(depth=1, dim=4), [1]))
    assert tier.namespaces() == []
