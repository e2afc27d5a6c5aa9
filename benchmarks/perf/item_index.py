"""What the item indexes cost: building, refreshing, searching with and without lists, and recall.

    python -m benchmarks.perf.item_index --output benchmarks/results/item_index.json

Item vectors are unit vectors around random centers, queries unit means of a few of them, as when a
user has several tastes. Searches of all kinds take turns, round by round; ratios are of medians.
The refresh of a version is timed part by part: computing the vectors, publishing them (files, with
checksums), loading them, and building the index until its recall is measured. Prints a table and
then one JSON line. It takes about three minutes and 1 GB.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.perf.figures import (
    Figure,
    Measured,
    at_least,
    exactly,
    json_line,
    print_table,
    write_result,
)
from benchmarks.perf.timing import Case, ratio_of_medians, time_in_turn
from cache_actors.registry import ITEMS, ModelRegistry
from marm.config import ModelConfig
from marm.items import ItemFeatures
from marm.retriever import Retriever
from stages.index_args import parse_index_args
from stages.index_build import build_item_index
from stages.index_recall import measure_recall, sample_queries
from stages.item_filters import EVERY_ITEM, ItemFilter, ItemLists
from stages.item_index import ItemIndex
from stages.similar_items import SimilarItems
from train.item_vectors import item_vectors

T = TypeVar("T")

MIN_RECALL = 0.95
UNSEEN_SLACK = 0.02
"""Other queries than the index was tuned with may find that much less."""

NUM_SEEN = 200


@dataclass(frozen=True)
class Settings:
    """Sizes; ``k`` are the candidates that are asked for. Above ``largest_graph`` items no graph is
    built: it takes many minutes."""

    sizes: tuple[int, ...] = (100_000, 1_000_000)
    kinds: tuple[str, ...] = ("exact", "ivf", "hnsw")
    largest_graph: int = 100_000
    k: tuple[int, ...] = (1000, 5000)
    width: int = 32
    centers: int = 500
    blocked: int = 10_000
    allowed: int = 1000
    rounds: int = 5
    searches: int = 20
    threads: int = 1
    seed: int = 0

    @staticmethod
    def quick() -> Settings:
        """Sizes that show that everything runs; their figures mean nothing."""
        return Settings(sizes=(3000,), k=(100,), blocked=2500, rounds=2, searches=3)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(argv)
    settings = Settings.quick() if options.quick else Settings()
    settings = replace(
        settings,
        sizes=tuple(options.sizes or settings.sizes),
        kinds=tuple(options.kinds),
        largest_graph=options.largest_graph,
        threads=options.threads,
        seed=options.seed,
    )
    torch.set_num_threads(settings.threads)
    started = time.monotonic()
    measured = [measure_size(settings, size) for size in settings.sizes]
    print_table("item index", measured)
    line = json_line("item_index", measured, asdict(settings), time.monotonic() - started)
    write_result(line, options.output)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of items")
    parser.add_argument("--kinds", nargs="+", default=list(Settings.kinds))
    parser.add_argument("--largest-graph", type=int, default=Settings.largest_graph)
    parser.add_argument("--threads", type=int, default=1, help="of torch and of the index")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--output", help="also write the JSON here")
    return parser.parse_args(argv)


def measure_size(settings: Settings, num_items: int) -> Measured:
    """Everything about one size of catalog; an exact index is always among the kinds."""
    items = some_items(num_items)
    vectors_MV = clustered_vectors(num_items, settings)
    medians: dict[str, float] = {}
    indexes: dict[str, ItemIndex] = {}
    kinds = [k for k in settings.kinds if k != "hnsw" or num_items <= settings.largest_graph]
    for kind in dict.fromkeys(("exact", *kinds)):
        build = partial_build(kind, items, vectors_MV, settings)
        indexes[kind], medians[f"{num_items}.{kind}.build_s"] = timed(build)
    medians |= refresh_times(items, settings)
    figures = recalls(indexes, vectors_MV, settings)
    for k in settings.k:
        found, times = searches(indexes, items, vectors_MV, settings, k)
        figures, medians = (*figures, *found), medians | times
    return Measured(figures, medians)


def partial_build(
    kind: str, items: ItemFeatures, vectors_MV: NDArray[np.float32], settings: Settings
) -> Callable[[], ItemIndex]:
    """The build of one kind, for the largest k that will be asked for."""
    args = parse_index_args(kind)
    if kind != "exact":
        args = args.model_copy(update={"recall_k": max(settings.k), "min_recall": MIN_RECALL})
    return lambda: build_item_index(args, items, vectors_MV, settings.threads)


def recalls(
    indexes: dict[str, ItemIndex], vectors_MV: NDArray[np.float32], settings: Settings
) -> tuple[Figure, ...]:
    """Recall of the approximate kinds, on queries they were not tuned with."""
    queries = sample_queries(vectors_MV, seed=settings.seed + 1)
    return tuple(
        Figure(
            f"{kind}_recall_at_{k}_of_{len(index)}",
            f"share of the {k} best of {len(index)} items that {kind} finds",
            exactly(measure_recall(index, indexes["exact"], queries, k)),
            at_least(round(MIN_RECALL - UNSEEN_SLACK, 3)),
        )
        for kind, index in indexes.items()
        for k in settings.k
        if kind != "exact"
    )


def searches(
    indexes: dict[str, ItemIndex],
    items: ItemFeatures,
    vectors_MV: NDArray[np.float32],
    settings: Settings,
    k: int,
) -> tuple[tuple[Figure, ...], dict[str, float]]:
    """Time of one search by kind and by lists, and what approximating saves."""
    rng = np.random.default_rng(settings.seed + 2)
    queries = sample_queries(vectors_MV, 512, settings.seed + 2)
    filters = some_filters(items, settings)

    def draw() -> NDArray[np.float32]:
        return queries[rng.integers(0, len(queries), 1)]

    def case(index: ItemIndex, item_filter: ItemFilter) -> Case:
        return Case(draw, lambda query: index.search(query, k, item_filter))

    cases = {
        f"{kind}.{name}": case(index, item_filter)
        for kind, index in indexes.items()
        for name, item_filter in filters.items()
    }
    similar = SimilarItems.small(items, vectors_MV, np.arange(len(items), dtype=np.float32))
    cases["similar_small"] = Case(
        lambda: rng.choice(items.item_id, 20),
        lambda seeds: similar.top(k, seeds, np.empty(0, np.int64)),
    )
    seconds = time_in_turn(cases, settings.rounds, settings.searches)
    figures = tuple(
        Figure(
            f"{kind}_over_exact_k{k}_of_{len(items)}",
            f"search for {k} of {len(items)} items, {NUM_SEEN} seen ones hidden",
            ratio_of_medians(seconds[f"{kind}.seen"], seconds["exact.seen"]),
        )
        for kind in indexes
        if kind != "exact"
    )
    return figures, {
        f"{len(items)}.{name}.k{k}_ms": float(np.median(times)) * 1000
        for name, times in seconds.items()
    }


def some_filters(items: ItemFeatures, settings: Settings) -> dict[str, ItemFilter]:
    """What requests hide: nothing, seen items, a standing block list, all but an allow list."""
    rng = np.random.default_rng(settings.seed + 3)
    seen = ItemLists.of([rng.choice(items.item_id, NUM_SEEN)])
    blocked = ItemLists.of([rng.choice(items.item_id, settings.blocked, replace=False)])
    allowed = ItemLists.of([], rng.choice(items.item_id, settings.allowed, replace=False))
    return {
        "all": EVERY_ITEM,
        "seen": ItemFilter(request=seen),
        "blocked": ItemFilter(standing=blocked, request=seen),
        "allowed": ItemFilter(request=allowed),
    }


def refresh_times(items: ItemFeatures, settings: Settings) -> dict[str, float]:
    """From trained weights to arrays that an index is built of."""
    torch.manual_seed(settings.seed)
    config = ModelConfig(stage="retrieval", output_dim=settings.width)
    model = Retriever(config)
    vectors_MV, vectors_s = timed(lambda: item_vectors(model, items))
    columns: dict[str, NDArray] = {
        "item_id": items.item_id,
        "author_id": items.author_id,
        "tag_id": items.tag_id,
        "duration_ms": items.duration_ms,
        "popularity": model.popularity(items),
        "vectors": vectors_MV,
    }
    with tempfile.TemporaryDirectory(prefix="marm-perf-") as scratch:
        registry = ModelRegistry(Path(scratch))
        document, extra = {"model": config.to_dict()}, {ITEMS: columns}
        version, publish_s = timed(
            lambda: registry.publish("retrieval", "default", model.state_dict(), document, extra)
        )
        _, load_s = timed(lambda: registry.load("retrieval", "default", version))
    return {
        f"{len(items)}.vectors_s": vectors_s,
        f"{len(items)}.publish_s": publish_s,
        f"{len(items)}.load_s": load_s,
    }


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """What ``run`` gives, and the seconds it took."""
    started = time.perf_counter()
    result = run()
    return result, time.perf_counter() - started


def some_items(num_items: int) -> ItemFeatures:
    """A catalog whose ids are scattered, as hashes are."""
    ids = np.random.default_rng(0).permutation(10 * num_items)[:num_items].astype(np.int64)
    return ItemFeatures(ids, ids % 5003, ids % 97, ids % 90_000)


def clustered_vectors(num_items: int, settings: Settings) -> NDArray[np.float32]:
    """Unit vectors around random centers, ``[M, V]``."""
    rng = np.random.default_rng(settings.seed)
    centers = rng.normal(size=(settings.centers, settings.width)).astype(np.float32)
    vectors = centers[rng.integers(0, settings.centers, num_items)]
    vectors += 0.5 * rng.standard_normal(vectors.shape, np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


if __name__ == "__main__":
    main()
