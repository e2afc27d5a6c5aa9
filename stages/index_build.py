"""From settings to an item index whose recall was measured."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from marm.items import ItemFeatures
from stages.index_args import (
    ExactIndexArgs,
    HnswIndexArgs,
    IndexArgs,
    IvfIndexArgs,
    parse_index_args,
)
from stages.index_recall import recall_of, sample_queries
from stages.item_index import Found, ItemIndex, check_vectors
from stages.item_index_approximate import ApproximateItemIndex, HnswItemIndex, IvfItemIndex
from stages.item_index_faiss import ExactItemIndex

_REMEDIES = {
    "ivf": "raise nprobe or leave it out",
    "hnsw": "raise M, ef_construction or ef_search",
}

logger = logging.getLogger("ray.serve")


def build_item_index(
    settings: IndexArgs | str,
    items: ItemFeatures,
    vectors_MV: NDArray[np.float32],
    num_threads: int = 1,
) -> ItemIndex:
    """An index of the items of a version.

    Args:
        settings: the settings, or the name of a kind.
        items: the items; of an id that occurs twice the last vector counts.
        vectors_MV: their vectors, in the same order.
        num_threads: threads for building it and for each of its searches.

    Raises:
        ValueError: for settings or vectors that make no sense, and when the index finds less than
            the configured share of what an exact one finds.
    """
    args = parse_index_args(settings)
    check_vectors(items, vectors_MV)
    if isinstance(args, ExactIndexArgs):
        return ExactItemIndex(items, vectors_MV, num_threads)
    index: ApproximateItemIndex
    if isinstance(args, IvfIndexArgs):
        index = IvfItemIndex(items, vectors_MV, args, num_threads)
    else:
        index = HnswItemIndex(items, vectors_MV, args, num_threads)
    if len(index):
        settle_effort(index, ExactItemIndex(items, vectors_MV, num_threads), vectors_MV, args)
    return index


def settle_effort(
    index: ApproximateItemIndex,
    reference: ExactItemIndex,
    vectors_MV: NDArray[np.float32],
    args: IvfIndexArgs | HnswIndexArgs,
) -> float:
    """Give ``index`` the configured effort, or the least that reaches the configured recall.

    Returns the recall against ``reference``.

    Raises:
        ValueError: when it stays below ``args.min_recall``.
    """
    queries = sample_queries(vectors_MV)
    truth = reference.search(queries, args.recall_k)
    effort = index.least_effort(args.recall_k) if args.effort is None else args.effort
    index.effort = min(effort, index.max_effort)
    recall = _recall(index, queries, truth, args.recall_k)
    while recall < args.min_recall and args.effort is None and index.effort < index.max_effort:
        index.effort = min(2 * index.effort, index.max_effort)
        recall = _recall(index, queries, truth, args.recall_k)
    if recall < args.min_recall:
        raise ValueError(
            f"its {args.kind} index must find at least {args.min_recall} of the {args.recall_k} "
            f"best items, got {recall:.3f} with {_effort_name(args)}={index.effort}; "
            f"{_REMEDIES[args.kind]}, lower min_recall, or use `index: exact`"
        )
    logger.info(
        "%s index of %d items: %s=%d, recall@%d %.3f",
        *(args.kind, len(index), _effort_name(args), index.effort, args.recall_k, recall),
    )
    return recall


def _recall(index: ItemIndex, queries: NDArray[np.float32], truth: list[Found], k: int) -> float:
    return recall_of(index.search(queries, k), truth)


def _effort_name(args: IvfIndexArgs | HnswIndexArgs) -> str:
    return "nprobe" if isinstance(args, IvfIndexArgs) else "ef_search"
