"""Small, randomly initialised models for tests that serve."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import torch

from cache_actors.home import Home
from cache_actors.registry import ModelRegistry
from marm.config import ModelConfig
from marm.items import ItemFeatures
from marm.memory import RAW_STEP, InProcessMemory, Namespace, UserRows
from marm.model_factory import build_model
from stages.depth import first_layers

NAMESPACE = Namespace(family="ranking", depth=1, dim=8)
NUM_ITEMS = 60
STAGES = ("retrieval", "cascading", "ranking")


def small_config(stage: str, namespace: Namespace = NAMESPACE, **changes) -> ModelConfig:
    return ModelConfig(
        **{
            "stage": stage,
            "namespace": namespace,
            "depth": namespace.depth,
            "history_length": 16,
            "attention_dim": namespace.dim,
            "feature_dim": 8,
            "num_slots": 1 << 10,
            "num_experts": 2,
            "expert_dim": 8,
            "output_dim": 8,
            **changes,
        }
    )


def some_items(num_items: int = NUM_ITEMS) -> ItemFeatures:
    ids = np.arange(1, num_items + 1, dtype=np.int64)
    return ItemFeatures(ids, ids % 7 + 1, ids % 5 + 1, ids * 1000)


def publish_model(
    registry: ModelRegistry, stage: str, seed: int = 0, variant: str = "default", **changes
) -> int:
    """Publish a random model; popularity falls with the item id."""
    config = small_config(stage, **changes)
    torch.manual_seed(seed)
    model = build_model(config)
    if model.net.sequence.errors is not None:
        torch.nn.init.normal_(model.net.sequence.errors.weight)  # zero at first: nothing to see
    extra = {}
    if stage == "retrieval":
        items = some_items()
        extra["items"] = {
            "item_id": items.item_id,
            "author_id": items.author_id,
            "tag_id": items.tag_id,
            "duration_ms": items.duration_ms,
            "popularity": np.linspace(1, 0, len(items)).astype(np.float32),
            "vectors": model.item_vectors(items),
        }
    document = {
        "step": seed,
        "model": config.to_dict(),
        "namespace": config.to_dict()["namespace"],
    }
    return registry.publish(stage, variant, model.state_dict(), document, extra)


def publish_all(home: Home, seed: int = 0, variant: str = "default") -> dict[str, int]:
    registry = ModelRegistry(home.models)
    return {stage: publish_model(registry, stage, seed, variant) for stage in STAGES}


def make_rows(
    item_ids: list[int], memorised: int = 0, namespace: Namespace = NAMESPACE, start_ms: int = 1000
) -> np.ndarray:
    """Rows a second apart, oldest first; the oldest ``memorised`` of them computed."""
    rows = np.zeros(len(item_ids), namespace.row_dtype)
    rows["item_id"] = item_ids
    rows["event_key"] = np.arange(1, len(item_ids) + 1) + start_ms
    rows["timestamp_ms"] = start_ms + 1000 * np.arange(len(item_ids))
    rows["written_step"] = RAW_STEP
    rows["written_step"][:memorised] = 1
    rows["memory"][:memorised] = 0.5
    return rows


class InProcessReader:
    """Serves an in-process memory the way a pool client does; `down` is a shard that died."""

    def __init__(self, namespace: Namespace = NAMESPACE) -> None:
        self.namespace = namespace
        self.memory = InProcessMemory(namespace)
        self.down = False

    def fetch_available(
        self, user_ids, n, before_ms=None, *, layers=None, timeout_s=None
    ) -> tuple[UserRows, np.ndarray]:
        found = self.memory.fetch(user_ids, 0 if self.down else n, before_ms)
        layers = self.namespace.depth if layers is None else layers
        return first_layers(found, layers), np.full(len(user_ids), self.down)

    def save(self, user_ids, rows):
        if self.down:
            raise ConnectionError("the shard is down")
        return self.memory.save(user_ids, rows)

    def save_for(self, user_id: int, rows: np.ndarray) -> None:
        self.memory.save(np.full(len(rows), user_id), rows)


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        threading.Event().wait(0.02)
