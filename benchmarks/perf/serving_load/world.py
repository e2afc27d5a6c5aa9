"""What is served while measuring: models of the sizes asked for, and users with long histories.

Weights and rows are random, shapes and paths are real: versions are published through the registry,
rows are saved through the pool.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.perf.stored_rows import RowMaker, user_ids
from cache_actors.event_log.catalog import append_items
from cache_actors.home import Home
from cache_actors.pool.client import MemoryClient
from cache_actors.registry import ITEMS, ModelRegistry
from marm.config import ModelConfig
from marm.items import ItemFeatures
from marm.memory import Ack, Namespace, UserRows
from marm.model_factory import build_model
from marm.retriever import Retriever
from stages.request import STAGES, StageName

VARIANT = "default"

_USERS_PER_SAVE = 4
_SAVE_TIMEOUT_S = 120.0
_NUM_AUTHORS, _NUM_TAGS, _LONGEST_S = 10_007, 101, 60


@dataclass(frozen=True)
class WorldSettings:
    """Sizes of models, memory and catalog. Histories are n of Eq. (1), by stage."""

    depth: int = 4
    dim: int = 128
    num_heads: int = 4
    feature_dim: int = 32
    ranking_history: int = 1_000
    cascading_history: int = 100
    retrieval_history: int = 200
    num_items: int = 20_000
    num_users: int = 32
    found: int = 2_000
    kept: int = 200
    shown: int = 20
    seed: int = 0

    @property
    def namespace(self) -> Namespace:
        """The memory that all stages read."""
        return Namespace(depth=self.depth, dim=self.dim)

    def users(self) -> NDArray[np.int64]:
        """Identifiers of all users."""
        return user_ids(self.num_users)

    def model_config(self, stage: StageName) -> ModelConfig:
        """The model of one stage."""
        history: dict[StageName, int] = {
            "retrieval": self.retrieval_history,
            "cascading": self.cascading_history,
            "ranking": self.ranking_history,
        }
        return ModelConfig(
            stage=stage,
            namespace=self.namespace,
            depth=self.depth,
            history_length=history[stage],
            attention_dim=self.dim,
            num_heads=self.num_heads,
            feature_dim=self.feature_dim,
        )


def make_items(num_items: int) -> ItemFeatures:
    """The items 1..M."""
    ids = np.arange(1, num_items + 1, dtype=np.int64)
    duration_ms = (ids % _LONGEST_S + 1) * 1_000
    return ItemFeatures(ids, ids % _NUM_AUTHORS, ids % _NUM_TAGS, duration_ms)


def make_world(home: Home, settings: WorldSettings) -> None:
    """Catalog and the first version of every model, in an empty home."""
    append_items(home.create().log, make_items(settings.num_items))
    for stage in STAGES:
        trained(settings, stage, settings.seed).publish(home)


@dataclass(frozen=True)
class Trained:
    """A model that is ready to be published, with its items if it is one of retrieval."""

    stage: StageName
    weights: dict[str, torch.Tensor]
    document: dict[str, Any]
    extra: dict[str, dict[str, NDArray]]

    def publish(self, home: Home) -> int:
        """Make it the newest version; its number."""
        registry = ModelRegistry(home.models)
        return registry.publish(self.stage, VARIANT, self.weights, self.document, self.extra)


def trained(settings: WorldSettings, stage: StageName, seed: int) -> Trained:
    """A model with random weights."""
    config = settings.model_config(stage)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(config)
    extra = {ITEMS: item_table(model, settings)} if isinstance(model, Retriever) else {}
    described = config.to_dict()
    document = {"step": seed, "model": described, "namespace": described["namespace"]}
    return Trained(stage, model.state_dict(), document, extra)


def item_table(model: Retriever, settings: WorldSettings) -> dict[str, NDArray]:
    """The whole catalog, as a retrieval model is published with it."""
    items = make_items(settings.num_items)
    return {
        "item_id": items.item_id,
        "author_id": items.author_id,
        "tag_id": items.tag_id,
        "duration_ms": items.duration_ms,
        "popularity": np.linspace(1, 0, len(items)).astype(np.float32),
        "vectors": model.item_vectors(items),
    }


def fill_memory(client: MemoryClient, settings: WorldSettings) -> None:
    """Give every user as many computed rows as ranking reads."""
    maker = RowMaker(settings.namespace)
    users = settings.users()
    acks: deque[Ack] = deque()
    for start in range(0, len(users), _USERS_PER_SAVE):
        part = users[start : start + _USERS_PER_SAVE]
        rows = maker.users_rows(part, settings.ranking_history).reshape(-1)
        acks.append(client.save(np.repeat(part, settings.ranking_history), rows))
    while acks:
        acks.popleft().wait(_SAVE_TIMEOUT_S)


def newest_rows(settings: WorldSettings, user_id: int, num_rows: int) -> UserRows:
    """The rows that a stage reads of a user, made again."""
    rows = RowMaker(settings.namespace).users_rows(
        np.array([user_id], np.int64), settings.ranking_history
    )[0, -num_rows:]
    return UserRows(np.array([user_id], np.int64), np.array([0, len(rows)]), rows)
