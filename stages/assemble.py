"""From a published version to a stage that can run: check, build, load, index."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from cache_actors.registry import PublishedModel
from marm.config import ModelConfig
from marm.items import ItemFeatures
from marm.memory import RAW_STEP, Namespace, UserRows
from marm.model_factory import build_model
from stages.cascading import CascadingStage
from stages.history import MemoryReader
from stages.item_index import build_item_index
from stages.models import CascadingModel, RankingModel, RetrievalModel, check_scores
from stages.popular import PopularItems
from stages.ranking import RankingStage
from stages.retrieval import RetrievalStage

OpenMemory = Callable[[Namespace], MemoryReader]
"""How a stage gets a reader of a namespace."""

ITEM_COLUMNS = ("item_id", "author_id", "tag_id", "duration_ms", "popularity")

PROBE_USER = 0
PROBE_NOW_MS = 1_000_000
PROBE_ITEMS = ItemFeatures(*(np.zeros(2, np.int64) for _ in range(4)))
"""A version must answer a made-up request before it goes live; that also warms it up."""


def published_config(published: PublishedModel, stage: str) -> ModelConfig:
    """The model configuration of a version, checked to be one that ``stage`` can serve."""
    if "model" not in published.config:
        raise ValueError("its config.json has no 'model' section; publish it again")
    config = ModelConfig.from_dict(published.config["model"])
    if config.stage != stage:
        raise ValueError(
            f"it is a {config.stage} model, but is published as {stage}; publish it as "
            f"{config.stage}"
        )
    recorded = published.config.get("namespace")
    if recorded is not None and Namespace(**recorded) != config.namespace:
        raise ValueError(
            f"its namespace {Namespace(**recorded).name} differs from the one its model was "
            f"built for, {config.namespace.name}; publish it again"
        )
    return config


def load_module(published: PublishedModel, config: ModelConfig) -> torch.nn.Module:
    """The model of a version with its weights, ready to score."""
    tensors: dict[str, torch.Tensor] = dict(published.tensors)
    broken = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if broken:
        raise ValueError(f"tensors {broken[:3]} hold NaN or infinity; train it again")
    module = build_model(config)
    module.load_state_dict(tensors)
    module.requires_grad_(False)
    return module.eval()


def one_row(namespace: Namespace) -> UserRows:
    """A raw row of the probe's user."""
    rows = np.zeros(1, namespace.row_dtype)
    rows["written_step"] = RAW_STEP
    return UserRows(np.array([PROBE_USER]), np.array([0, 1]), rows)


def published_items(items: Mapping[str, NDArray]) -> tuple[ItemFeatures, NDArray[np.float32]]:
    """Features and popularity of the items that a retrieval version was published with."""
    absent = [name for name in ITEM_COLUMNS if name not in items]
    if absent:
        raise ValueError(f"its items lack the columns {absent}; publish the retrieval model again")
    columns = (np.asarray(items[name], np.int64) for name in ITEM_COLUMNS[:4])
    return ItemFeatures(*columns), np.asarray(items["popularity"], np.float32)


def build_retrieval(
    published: PublishedModel, open_memory: OpenMemory, index_kind: str
) -> RetrievalStage:
    """A retrieval stage of a published version."""
    config = published_config(published, "retrieval")
    items, popularity = published_items(published.items)
    if "vectors" not in published.items:
        raise ValueError("its items lack 'vectors'; publish the retrieval model again")
    vectors_MV = np.asarray(published.items["vectors"], np.float32)
    if vectors_MV.ndim != 2 or vectors_MV.shape[1] != config.output_dim:
        raise ValueError(
            f"item vectors must be [M, {config.output_dim}], got {list(vectors_MV.shape)}; "
            "publish the retrieval model again"
        )
    model = cast(RetrievalModel, load_module(published, config))
    vector_V = model.user_vector(one_row(config.namespace), PROBE_USER, PROBE_NOW_MS, 0)
    check_scores(vector_V, (config.output_dim,), "its user vector")
    return RetrievalStage(
        variant=published.variant,
        version=published.version,
        model=model,
        memory=open_memory(config.namespace),
        history_length=config.history_length,
        depth=config.depth,
        index=build_item_index(index_kind, items, vectors_MV),
        popular=PopularItems.ranked(items, popularity),
    )


def build_cascading(published: PublishedModel, open_memory: OpenMemory) -> CascadingStage:
    """A cascading stage of a published version."""
    config = published_config(published, "cascading")
    model = cast(CascadingModel, load_module(published, config))
    rows = one_row(config.namespace)
    scores_M = model.score(rows, PROBE_USER, PROBE_ITEMS, PROBE_NOW_MS, 0)
    check_scores(scores_M, (len(PROBE_ITEMS),), "its probe")
    return CascadingStage(
        variant=published.variant,
        version=published.version,
        model=model,
        memory=open_memory(config.namespace),
        history_length=config.history_length,
        depth=config.depth,
    )


def build_ranking(published: PublishedModel, open_memory: OpenMemory) -> RankingStage:
    """A ranking stage of a published version."""
    config = published_config(published, "ranking")
    model = cast(RankingModel, load_module(published, config))
    rows = one_row(config.namespace)
    scores_MT = model.score(rows, PROBE_USER, PROBE_ITEMS, PROBE_NOW_MS, 0)
    check_scores(scores_MT, (len(PROBE_ITEMS), len(config.tasks)), "its probe")
    return RankingStage(
        variant=published.variant,
        version=published.version,
        model=model,
        memory=open_memory(config.namespace),
        history_length=config.history_length,
        depth=config.depth,
        tasks=config.tasks,
    )
