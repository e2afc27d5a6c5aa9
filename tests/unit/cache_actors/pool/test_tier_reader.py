"""Reading users from the durable tier while a part of it is down too."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from redis_servers import redis_cluster

from cache_actors.pool.errors import PartlyUnavailable
from cache_actors.pool.gather import gather, known_part
from cache_actors.pool.readers import TierReader
from cache_actors.store.lookup import UserState
from cache_actors.tiers.redis_tier import RedisTier
from marm.memory import Namespace, UserRows

NAMESPACE = Namespace(dim=8)
NUM_USERS = 60
USERS = np.arange(NUM_USERS)


def test_a_dead_node_of_a_cluster_fails_only_its_users() -> None:
    rows = np.zeros(2 * NUM_USERS, NAMESPACE.row_dtype)
    rows["timestamp_ms"] = rows["event_key"] = np.arange(len(rows))
    with redis_cluster() as cluster:
        tier = RedisTier.connect(cluster.url, "test")
        tier.put(NAMESPACE, UserRows(USERS, np.arange(0, len(rows) + 1, 2), rows))
        cluster.nodes[0].kill()
        with pytest.raises(PartlyUnavailable, match="of 60 users") as raised:
            TierReader(tier, NAMESPACE).begin(USERS, 1, None, None)(5.0)
        tier.close()
    missing = pickle.loads(pickle.dumps(raised.value)).missing  # it may come from another process
    assert 0 < missing.sum() < NUM_USERS
    answer = known_part(USERS, raised.value)
    assert answer.positions.tolist() == USERS[~missing].tolist()
    assert set(answer.found.state.tolist()) == {UserState.FOUND}
    found = gather(USERS, NAMESPACE.row_dtype, [answer]).rows
    assert found.counts.tolist() == (~missing).astype(int).tolist()
    assert found.rows.tobytes() == rows[1::2][~missing].tobytes()
