"""Retrieval with several user vectors, every kind of index, and lists of items."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from serving_models import NUM_ITEMS, InProcessReader, make_rows, publish_model, some_items

from cache_actors.registry import ModelRegistry
from marm.items import ItemFeatures
from stages.assemble import build_retrieval
from stages.index_args import HnswIndexArgs, IvfIndexArgs
from stages.item_index_faiss import ExactItemIndex
from stages.knobs import RetrievalKnobs
from stages.request import StageRequest

USER = 5
SEEN = [1, 2, 3]


def make_request(limit: int = 10, **changes) -> StageRequest:
    deadline_ms = int(time.time() * 1000) + 60_000
    return StageRequest(
        **{
            "request_id": "r",
            "user_id": USER,
            "now_ms": 1_000_000,
            "before_ms": None,
            "context_id": 0,
            "limit": limit,
            "deadline_ms": deadline_ms,
            **changes,
        }
    )


@pytest.fixture
def reader():
    reader = InProcessReader()
    reader.save_for(USER, make_rows(SEEN, memorised=2))
    return reader


@pytest.fixture
def registry(tmp_path):
    return ModelRegistry(tmp_path / "models")


def load(registry, reader, index="exact", **changes):
    version = publish_model(registry, "retrieval", **changes)
    published = registry.load("retrieval", "default", version)
    return build_retrieval(published, lambda namespace: reader, index)


def ids(result) -> list[int]:
    return result.candidates.item_id.tolist()


@pytest.mark.parametrize(
    "index", ["exact", "ivf", "hnsw", IvfIndexArgs(nlist=500), HnswIndexArgs(M=4)]
)
@pytest.mark.parametrize("num_user_vectors", [1, 3])
def test_items_come_by_their_best_score_each_once(registry, reader, index, num_user_vectors):
    stage = load(registry, reader, index, num_user_vectors=num_user_vectors)
    found = stage.run(make_request(limit=20), RetrievalKnobs(filter_seen=False))
    rows = reader.memory.fetch(np.array([USER]), 16)
    users = stage.model.user_vectors(rows, USER, 1_000_000, 0)
    assert users.shape == (num_user_vectors, 8)
    vectors = registry.load("retrieval", "default", 1).items["vectors"]
    best = (vectors @ users.T).max(axis=1)
    assert found.scores == pytest.approx(np.sort(best)[::-1][:20], abs=1e-5)
    assert len(set(ids(found))) == 20
    np.testing.assert_allclose(found.scores, best[np.array(ids(found)) - 1], atol=1e-5)


def test_lists_of_the_settings_and_of_the_request(registry, reader):
    stage = load(registry, reader, num_user_vectors=2)
    knobs = RetrievalKnobs(blocked_item_ids=(9, 10), allowed_item_ids=tuple(range(1, 31)))
    everything = make_request(NUM_ITEMS)
    assert sorted(ids(stage.run(everything, knobs))) == sorted({*range(4, 31)} - {9, 10})
    request = replace(
        everything,
        exclude_item_ids=np.array([11, 12]),
        allow_item_ids=np.array([2, 9, 12, 40, 13, 14, 99]),
    )
    assert sorted(ids(stage.run(request, knobs))) == [13, 14]
    assert sorted(ids(stage.run(request, RetrievalKnobs()))) == [9, 13, 14, 40]
    assert knobs.lists is knobs.lists


def test_lists_hold_for_users_without_rows(registry, reader):
    stage = load(registry, reader)
    knobs = RetrievalKnobs(blocked_item_ids=(1,), allowed_item_ids=(1, 2, 3, 50, 60))
    request = make_request(user_id=77, limit=3, exclude_item_ids=np.array([2]))
    result = stage.run(request, knobs)
    assert (ids(result), result.source) == ([3, 50, 60], "popular")
    result = stage.run(replace(request, allow_item_ids=np.array([60, 2, 50])), knobs)
    assert ids(result) == [50, 60]


def test_an_allow_list_of_unknown_items_leaves_nothing_and_says_so(registry, reader):
    stage = load(registry, reader)
    result = stage.run(make_request(allow_item_ids=np.array([10**9])), RetrievalKnobs())
    assert len(result) == 0
    assert result.reason == "the allow and block lists leave no item"
    for user_id in (USER, 77):
        result = stage.run(make_request(user_id=user_id), RetrievalKnobs(allowed_item_ids=(10**9,)))
        assert (len(result), result.reason) == (0, "the allow and block lists leave no item")


def test_seen_items_return_when_the_allow_list_leaves_nothing_else(registry, reader):
    stage = load(registry, reader)
    result = stage.run(make_request(allow_item_ids=np.array([1, 3])), RetrievalKnobs())
    assert sorted(ids(result)) == [1, 3]
    assert "seen before" in result.reason


def test_bad_lists_are_refused():
    for settings in (
        {"allowed_item_ids": []},
        {"allowed_item_ids": [-1]},
        {"blocked_item_ids": [1.5]},
        {"allowed_item_ids": list(range(100_001))},
    ):
        with pytest.raises(ValueError, match="validation error"):
            RetrievalKnobs.model_validate(settings)


def test_a_user_vector_that_is_not_finite_fails_the_request(registry, reader):
    stage = load(registry, reader)

    class Broken:
        def user_vectors(self, rows, user_id, now_ms, context_id):
            return np.full((1, 8), np.nan, np.float32)

    with pytest.raises(ValueError, match="gave a user vector that is not finite"):
        replace(stage, model=Broken()).run(make_request(), RetrievalKnobs())


def test_a_version_without_items_answers_nothing(registry, reader):
    stage = load(registry, reader)
    empty = ExactItemIndex(ItemFeatures.empty(), np.empty((0, 8), np.float32))
    assert len(replace(stage, index=empty).run(make_request(limit=3), RetrievalKnobs())) == 3
    nothing = replace(stage, index=empty, popular=stage.popular.head(0))
    result = nothing.run(make_request(), RetrievalKnobs())
    assert (len(result), result.num_in, result.reason) == (0, 0, "")


def test_a_version_whose_index_finds_too_little_is_refused(registry, reader):
    args = HnswIndexArgs(M=4, ef_construction=8, ef_search=1, recall_k=1, min_recall=1.0)
    version = publish_model(registry, "retrieval")
    published = registry.load("retrieval", "default", version)
    drawn = np.random.default_rng(0).normal(size=(4000, 8)).astype(np.float32)
    many = {
        **{name: np.resize(column, 4000) for name, column in published.items.items()},
        "item_id": np.arange(1, 4001),
        "vectors": drawn / np.linalg.norm(drawn, axis=1, keepdims=True),
    }
    larger = replace(published, extra={"items": many})
    with pytest.raises(ValueError, match=r"hnsw index must find at least 1\.0 of the 1 best"):
        build_retrieval(larger, lambda namespace: reader, args)
    stage = build_retrieval(larger, lambda namespace: reader, HnswIndexArgs(), num_threads=2)
    found = stage.run(make_request(limit=3000), RetrievalKnobs())
    assert len(found) == 3000
    assert not set(ids(found)) & set(SEEN)


def test_popular_items_keep_an_allow_list(registry, reader):
    popular = load(registry, reader).popular
    assert len(some_items()) == len(popular)
    found = popular.top(3, np.array([7]), np.array([40, 7, 9, 8, 10**9, 55]))
    assert found.items.item_id.tolist() == [8, 9, 40]
