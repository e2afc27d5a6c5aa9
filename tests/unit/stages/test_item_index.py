"""Every kind of index against a full sort, with and without filters."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import faiss
import numpy as np
import pytest
from serving_models import some_items

from marm.items import ItemFeatures
from stages.index_args import HnswIndexArgs, IvfIndexArgs
from stages.index_build import build_item_index
from stages.index_recall import measure_recall, recall_of, sample_queries
from stages.item_filters import EVERY_ITEM, ItemFilter, ItemLists
from stages.item_index import MAX_FOUND, Found, best_of
from stages.item_index_approximate import HnswItemIndex, IvfItemIndex
from stages.item_index_faiss import MAX_DROPPED, ExactItemIndex

KINDS = ("exact", "hnsw", "ivf")
NUM_ITEMS = 5000
FEW = ItemFilter(request=ItemLists.of([np.arange(100, 160)]))
MANY = ItemFilter(standing=ItemLists.of([np.arange(1, NUM_ITEMS - 100)]))
DROPPED_BY_SELECTOR = ItemFilter(request=ItemLists.of([np.arange(2000, 2001 + MAX_DROPPED)]))
SHORT_ALLOW_LIST = ItemFilter(request=ItemLists.of([[6, 7]], np.array([5, 6, 7, 8, 4000, 10**9])))
LONG_ALLOW_LIST = ItemFilter(
    standing=ItemLists.of([[9, 11]], np.arange(1, 4000)),
    request=ItemLists.of([[13]], np.arange(8, 4900)),
)
FILTERS = (EVERY_ITEM, FEW, MANY, DROPPED_BY_SELECTOR, SHORT_ALLOW_LIST, LONG_ALLOW_LIST)


def random_vectors(num: int, width: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num, width)).astype(np.float32)


def clustered_vectors(num: int, width: int = 8) -> np.ndarray:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(20, width))
    vectors = centers[rng.integers(0, 20, num)] + 0.3 * rng.normal(size=(num, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors():
    return clustered_vectors(NUM_ITEMS)


@pytest.fixture(scope="module")
def indexes(vectors):
    return {kind: build_item_index(kind, some_items(NUM_ITEMS), vectors) for kind in KINDS}


def permitted_ids(item_filter: ItemFilter) -> np.ndarray:
    ids = some_items(NUM_ITEMS).item_id
    for lists in item_filter.all_lists:
        ids = ids[~np.isin(ids, lists.blocked)]
        ids = ids if lists.allowed is None else ids[np.isin(ids, lists.allowed)]
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_search_equals_a_full_sort(kind):
    items, vectors = some_items(50), random_vectors(50)
    index = build_item_index(kind, items, vectors)
    queries = random_vectors(3, seed=1)
    for query, found in zip(queries, index.search(queries, 7), strict=True):
        order = np.argsort(-(vectors @ query))[:7]
        assert found.items.item_id.tolist() == items.item_id[order].tolist()
        assert found.items.author_id.tolist() == items.author_id[order].tolist()
        np.testing.assert_allclose(found.scores, (vectors @ query)[order], rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 40, 1000, NUM_ITEMS])
@pytest.mark.parametrize("item_filter", FILTERS)
def test_a_filter_costs_no_results(indexes, vectors, kind, k, item_filter):
    queries = sample_queries(vectors, 3, seed=2)
    permitted = permitted_ids(item_filter)
    for query, found in zip(queries, indexes[kind].search(queries, k, item_filter), strict=True):
        ids = found.items.item_id
        assert len(ids) == len(set(ids.tolist())) == min(k, len(permitted))
        assert np.isin(ids, permitted).all()
        np.testing.assert_allclose(found.scores, vectors[ids - 1] @ query, rtol=1e-4, atol=1e-6)
        assert all(one >= other for one, other in pairwise(found.scores))
        best = np.sort(vectors[permitted - 1] @ query)[::-1][: len(ids)]
        share = (found.scores >= best[-1] - 1e-5).mean() if len(best) else 1.0
        # One query may fall short of what holds over many.
        assert share >= (1.0 if kind == "exact" or len(permitted) < 1000 else 0.6)


@pytest.mark.parametrize("kind", KINDS)
def test_few_permitted_items_are_compared_exactly(indexes, vectors, kind):
    query = sample_queries(vectors, 1)
    for item_filter in (MANY, SHORT_ALLOW_LIST):
        permitted = permitted_ids(item_filter)
        (found,) = indexes[kind].search(query, 50, item_filter)
        order = np.argsort(-(vectors[permitted - 1] @ query[0]), kind="stable")[:50]
        assert found.items.item_id.tolist() == permitted[order].tolist()


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_recall_reaches_what_is_configured(indexes, vectors, kind):
    queries = sample_queries(vectors)
    assert measure_recall(indexes[kind], indexes["exact"], queries, 1000) >= 0.95
    assert measure_recall(indexes["exact"], indexes[kind], queries, 10) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_is_answered_alike_alone_and_beside_others(indexes, vectors, kind):
    queries = sample_queries(vectors, 30)
    for k in (40, 2000):
        for item_filter in FILTERS:
            together = indexes[kind].search(queries, k, item_filter)
            for i in range(0, 30, 7):
                (alone,) = indexes[kind].search(queries[i : i + 1], k, item_filter)
                np.testing.assert_allclose(alone.scores, together[i].scores, atol=1e-6)


def test_only_the_queries_that_found_too_few_are_answered_exactly():
    # Clusters of 500 and 40 items; of the smaller one's neighbours 40 are found in one probe.
    vectors = np.zeros((540, 2), np.float32)
    vectors[:500], vectors[500:] = [1, 0], [0, 1]
    vectors += np.random.default_rng(0).normal(scale=0.01, size=vectors.shape).astype(np.float32)
    items = some_items(540)
    index = IvfItemIndex(items, vectors, IvfIndexArgs(nlist=2, nprobe=1))
    index.least_effort = lambda k: 1  # type: ignore[method-assign]
    asked = []
    probe = index._probe

    def counted(queries, k, permitted, nprobe):
        asked.append((len(queries), nprobe))
        return probe(queries, k, permitted, nprobe)

    index._probe = counted  # type: ignore[method-assign]
    queries = np.array([[1, 0], [0, 1], [1, 0.01]], np.float32)
    found = index.search(queries, 100)
    assert asked == [(3, 1), (1, 2)]
    for query, one in zip(queries, found, strict=True):
        np.testing.assert_allclose(one.scores, np.sort(vectors @ query)[::-1][:100], atol=1e-6)


def test_only_the_effort_that_is_needed_is_spent(vectors):
    items = some_items(NUM_ITEMS)
    efforts = [
        build_item_index(IvfIndexArgs(min_recall=recall, recall_k=100), items, vectors).effort
        for recall in (0.5, 0.999)
    ]
    assert efforts[0] < efforts[1] <= 70  # the square root of the number of items


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            IvfIndexArgs(nlist=100, nprobe=1, min_recall=0.99, recall_k=10),
            "ivf index must find at least 0.99 of the 10 best items, got .* with nprobe=1; raise",
        ),
        (
            HnswIndexArgs(M=4, ef_construction=8, ef_search=1, min_recall=1.0, recall_k=10),
            "hnsw index must find at least 1.0 .* with ef_search=1; raise",
        ),
    ],
)
def test_an_index_below_the_configured_recall_is_refused(vectors, args, message):
    with pytest.raises(ValueError, match=message):
        build_item_index(args, some_items(NUM_ITEMS), vectors)


def test_the_recall_at_load_is_logged(vectors, caplog):
    with caplog.at_level(logging.INFO, "ray.serve"):
        build_item_index("ivf", some_items(NUM_ITEMS), vectors)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"ivf index of {NUM_ITEMS} items: nprobe=")
    assert "recall@1000 0.9" in line or "recall@1000 1.0" in line


def test_recall_counts_ties_and_misses():
    def found(*scores: float) -> Found:
        return Found(some_items(len(scores)), np.array(scores, np.float32))

    assert recall_of([found(3, 2, 1, 1)], [found(3, 2, 1, 1)]) == 1.0
    assert recall_of([found(3, 1)], [found(3, 2)]) == 0.5
    assert recall_of([Found.nothing(), found(5, 4)], [found(3, 2), found(5, 4)]) == 0.5
    assert recall_of([Found.nothing()], [Found.nothing()]) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing(vectors, kind):
    items = some_items(1000)
    index = build_item_index(kind, items, vectors[:1000], num_threads=2)
    exact = ExactItemIndex(items, vectors[:1000])
    assert measure_recall(index, exact, sample_queries(vectors, 4), 100) >= 0.9


def test_a_search_keeps_to_its_threads_whoever_calls():
    items, vectors = some_items(50), random_vectors(50)
    index = build_item_index("exact", items, vectors, num_threads=1)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(faiss.omp_set_num_threads, 3).result()
        pool.submit(index.search, random_vectors(1), 5).result()
        assert pool.submit(faiss.omp_get_max_threads).result() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_searches_at_the_same_time_do_not_disturb_each_other(indexes, vectors, kind):
    queries = sample_queries(vectors, 40)

    def search(i: int) -> list[int]:
        (found,) = indexes[kind].search(queries[i : i + 1], 50, FILTERS[i % len(FILTERS)])
        return found.items.item_id.tolist()

    alone = [search(i) for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(search, range(40))) == alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_items", [1, 2, 38, 100])
def test_small_catalogs_are_searched_whole(kind, num_items):
    settings = {
        "exact": "exact",
        "hnsw": HnswIndexArgs(M=64),
        "ivf": IvfIndexArgs(nlist=1000, nprobe=1000),
    }[kind]
    index = build_item_index(settings, some_items(num_items), random_vectors(num_items))
    (found,) = index.search(random_vectors(1), 1000)
    assert sorted(found.items.item_id.tolist()) == list(range(1, num_items + 1))


def test_with_few_items_there_are_fewer_clusters():
    assert IvfItemIndex(some_items(100), random_vectors(100), IvfIndexArgs(nlist=50)).nlist == 2
    assert IvfItemIndex(some_items(3), random_vectors(3), IvfIndexArgs(nlist=50)).nlist == 1


@pytest.mark.parametrize("kind", KINDS)
def test_empty_index_finds_nothing(kind):
    index = build_item_index(kind, ItemFeatures.empty(), np.empty((0, 4), np.float32))
    assert len(index) == 0
    assert index.width == 4
    assert [len(found) for found in index.search(random_vectors(2), 10)] == [0, 0]
    assert len(index.search(random_vectors(1), 10, SHORT_ALLOW_LIST)[0]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_items_without_any_difference_are_found_all_the_same(kind):
    items = some_items(500)
    index = build_item_index(kind, items, np.ones((500, 4), np.float32))
    (found,) = index.search(np.ones((1, 4), np.float32), 300)
    assert len(set(found.items.item_id.tolist())) == 300


@pytest.mark.parametrize("kind", KINDS)
def test_lists_of_unknown_items(indexes, kind):
    query = random_vectors(1, 8)
    unknown = np.array([10**12, -4])
    (found,) = indexes[kind].search(query, 5, ItemFilter(request=ItemLists.of([unknown])))
    assert len(found) == 5
    (found,) = indexes[kind].search(query, 5, ItemFilter(request=ItemLists.of([], unknown)))
    assert len(found) == 0


@pytest.mark.parametrize("k", [0, -3])
def test_nothing_asked_nothing_found(k):
    index = ExactItemIndex(some_items(5), random_vectors(5))
    assert len(index.search(random_vectors(1), k)[0]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_repeated_item_the_last_vector_counts(kind):
    items = some_items(3).take(np.array([0, 1, 0]))
    vectors = np.array([[9, 9], [1, 0], [0, 1]], np.float32)
    index = build_item_index(kind, items, vectors)
    (found,) = index.search(np.array([[1, 0]], np.float32), 3)
    assert found.items.item_id.tolist() == [2, 1]
    assert found.scores.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "vectors",
    [
        random_vectors(4),
        np.full((5, 4), np.nan, np.float32),
        np.zeros(5, np.float32),
        np.zeros((5, 0), np.float32),
    ],
)
def test_vectors_that_cannot_be_searched_are_refused(kind, vectors):
    with pytest.raises(ValueError, match="item vectors must be"):
        build_item_index(kind, some_items(5), vectors)


@pytest.mark.parametrize("kind", KINDS)
def test_searches_that_make_no_sense_are_refused(indexes, kind):
    index = indexes[kind]
    with pytest.raises(ValueError, match=r"queries must be \[Q, 8\], got \[1, 3\]"):
        index.search(random_vectors(1, 3), 2)
    with pytest.raises(ValueError, match=r"queries must be \[Q, 8\], got \[8\]"):
        index.search(random_vectors(1, 8)[0], 2)
    with pytest.raises(ValueError, match="queries must be finite"):
        index.search(np.full((1, 8), np.nan, np.float32), 2)
    with pytest.raises(ValueError, match=f"k must be at most {MAX_FOUND}, got {MAX_FOUND + 1}"):
        index.search(random_vectors(1, 8), MAX_FOUND + 1)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="must be one of"):
        build_item_index("magic", some_items(5), random_vectors(5))


def test_results_are_merged_by_best_score_each_item_once(vectors):
    items = some_items(NUM_ITEMS)
    index = ExactItemIndex(items, vectors)
    queries = sample_queries(vectors, 4)
    merged = best_of(index.search(queries, 30), 30)
    best = (vectors @ queries.T).max(axis=1)
    order = np.argsort(-best)[:30]
    assert merged.items.item_id.tolist() == items.item_id[order].tolist()
    assert merged.items.author_id.tolist() == items.author_id[order].tolist()
    np.testing.assert_allclose(merged.scores, best[order], rtol=1e-5)
    assert len(best_of([], 5)) == len(best_of([Found.nothing()] * 2, 5)) == 0
    assert len(best_of([merged], 3)) == 3


def test_hnsw_takes_its_parameters():
    args = HnswIndexArgs(M=6, ef_construction=11)
    index = HnswItemIndex(some_items(50), random_vectors(50), args)
    assert index._index.hnsw.efConstruction == 11
    assert index._index.hnsw.nb_neighbors(1) == 6
