"""Answers of shards, put together in the order of the question."""

from __future__ import annotations

import numpy as np
import pytest

from cache_actors.pool.gather import ShardAnswer, gather
from cache_actors.pool.placement import Placement
from cache_actors.store.lookup import Lookup, UserState
from marm.memory import InProcessMemory, Namespace, UserRows


def as_lookup(rows: UserRows) -> Lookup:
    state = np.where(rows.counts > 0, UserState.FOUND, UserState.ABSENT)
    return Lookup(rows, state.astype(np.uint8))


@pytest.mark.parametrize("namespace", [Namespace(), Namespace(depth=0)])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_gathered_answers_equal_one_store(namespace: Namespace, num_shards: int) -> None:
    rng = np.random.default_rng(0)
    owners = rng.integers(0, 30, 400)
    rows = np.zeros(400, namespace.row_dtype)
    rows["timestamp_ms"] = np.arange(400)
    rows["event_key"] = rng.integers(0, 2**60, 400)
    memory = InProcessMemory(namespace)
    memory.save(owners, rows)
    user_ids = rng.permutation(40)  # ten of them have no rows
    answers = [
        ShardAnswer(share.positions, as_lookup(memory.fetch(user_ids[share.positions], 5)))
        for share in Placement.even(num_shards).split(user_ids)
    ]
    answer = gather(user_ids, namespace.row_dtype, answers)
    found = answer.rows
    assert ((answer.state == UserState.FOUND) == (found.counts > 0)).all()
    expected = memory.fetch(user_ids, 5)
    assert found.user_ids.tolist() == user_ids.tolist()
    assert found.offsets.tolist() == expected.offsets.tolist()
    assert found.rows.tobytes() == expected.rows.tobytes()


def test_users_without_an_answer_have_no_rows() -> None:
    namespace = Namespace()
    memory = InProcessMemory(namespace)
    memory.save(np.array([5]), np.zeros(1, namespace.row_dtype))
    answer = ShardAnswer(np.array([1]), as_lookup(memory.fetch(np.array([5]), 9)))
    found = gather(np.array([4, 5, 6]), namespace.row_dtype, [answer])
    assert found.rows.counts.tolist() == [0, 1, 0]
    assert found.state.tolist() == [UserState.ABSENT, UserState.FOUND, UserState.ABSENT]
    nothing = gather(np.array([4, 5]), namespace.row_dtype, []).rows
    assert nothing.counts.tolist() == [0, 0]
    assert nothing.rows.dtype == namespace.row_dtype


def test_of_several_answers_for_a_user_the_last_counts() -> None:
    namespace = Namespace()
    memory = InProcessMemory(namespace)
    user_ids = np.array([4, 5])
    before = ShardAnswer(np.array([0, 1]), as_lookup(memory.fetch(user_ids, 9)))
    memory.save(np.array([5, 5]), np.zeros(2, namespace.row_dtype)[:1].repeat(2))
    after = ShardAnswer(np.array([1]), as_lookup(memory.fetch(user_ids[1:], 9)))
    found = gather(user_ids, namespace.row_dtype, [before, after])
    assert found.rows.counts.tolist() == [0, 1]
    assert found.state.tolist() == [UserState.ABSENT, UserState.FOUND]
