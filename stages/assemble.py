"""From a published version to a stage that can run: check, build, load, index."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
from numpy.typing import NDArray

from cache_actors.registry import PublishedModel
from marm.config import ModelConfig
from marm.items import ItemFeatures
from marm.memory import Namespace
from marm.model_factory import Model, build_unfilled
from marm.scoring_plan import ScoringPlan
from marm.supervised import SupervisedModel
from stages.cascading import CascadingStage
from stages.history import MemoryReader
from stages.index_args import IndexArgs
from stages.index_build import build_item_index
from stages.models import RetrievalModel, ScoringModel
from stages.popular import PopularItems
from stages.ranking import RankingStage
from stages.retrieval import RetrievalStage
from stages.turns import Turns
from stages.version_checks import (
    check_memory,
    check_probe,
    load_weights,
    recorded_probe,
    warm,
)

OpenMemory = Callable[[Namespace], MemoryReader]
"""How a stage gets a reader of a namespace."""

EXACT = ScoringPlan()
"""The rows that the model attended to in training, in single precision."""

ITEM_COLUMNS = ("item_id", "author_id", "tag_id", "duration_ms", "popularity")


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


def load_module(published: PublishedModel, config: ModelConfig, plan: ScoringPlan = EXACT) -> Model:
    """The model of a version with its weights, ready to score as ``plan`` says, and warm."""
    model = build_unfilled(config)
    load_weights(model, published.tensors)
    model.requires_grad_(False)
    model.eval()
    check_probe(model, recorded_probe(published.config))
    if isinstance(model, SupervisedModel):
        model.freeze(plan)
    warm(model, config.history_length)
    return model


def checked_memory(open_memory: OpenMemory, namespace: Namespace) -> MemoryReader:
    """A reader of ``namespace``, after a first read."""
    memory = open_memory(namespace)
    check_memory(memory, namespace)
    return memory


def published_items(items: Mapping[str, NDArray]) -> tuple[ItemFeatures, NDArray[np.float32]]:
    """Features and popularity of the items that a retrieval version was published with."""
    absent = [name for name in ITEM_COLUMNS if name not in items]
    if absent:
        raise ValueError(f"its items lack the columns {absent}; publish the retrieval model again")
    columns = (np.asarray(items[name], np.int64) for name in ITEM_COLUMNS[:4])
    return ItemFeatures(*columns), np.asarray(items["popularity"], np.float32)


def build_retrieval(
    published: PublishedModel,
    open_memory: OpenMemory,
    index: IndexArgs | str = "exact",
    num_threads: int = 1,
    turns: Turns | None = None,
) -> RetrievalStage:
    """A retrieval stage of a published version; ``index`` is as `build_item_index` takes it, and
    ``turns`` are those of the replica, which all of its versions share."""
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
    return RetrievalStage(
        variant=published.variant,
        version=published.version,
        model=model,
        memory=checked_memory(open_memory, config.namespace),
        history_length=config.history_length,
        depth=config.read_depth,
        index=build_item_index(index, items, vectors_MV, num_threads),
        popular=PopularItems.ranked(items, popularity),
        turns=turns or Turns(),
    )


def build_cascading(
    published: PublishedModel,
    open_memory: OpenMemory,
    plan: ScoringPlan = EXACT,
    turns: Turns | None = None,
) -> CascadingStage:
    """A cascading stage of a published version that scores as ``plan`` says; ``turns`` are those of
    the replica, which all of its versions share."""
    config = published_config(published, "cascading")
    model = cast(ScoringModel, load_module(published, config, plan))
    return CascadingStage(
        variant=published.variant,
        version=published.version,
        model=model,
        memory=checked_memory(open_memory, config.namespace),
        history_length=config.history_length,
        depth=config.depth,
        error_layers=config.error_layers,
        turns=turns or Turns(),
    )


def build_ranking(
    published: PublishedModel,
    open_memory: OpenMemory,
    plan: ScoringPlan = EXACT,
    turns: Turns | None = None,
) -> RankingStage:
    """A ranking stage of a published version that scores as ``plan`` says; ``turns`` are those of
    the replica, which all of its versions share."""
    config = published_config(published, "ranking")
    model = cast(ScoringModel, load_module(published, config, plan))
    return RankingStage(
        variant=published.variant,
        version=published.version,
        model=model,
        memory=checked_memory(open_memory, config.namespace),
        history_length=config.history_length,
        depth=config.depth,
        error_layers=config.error_layers,
        tasks=config.tasks,
        turns=turns or Turns(),
    )
