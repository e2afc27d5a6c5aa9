"""Random events, rows and small models for tests of the model and of training."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from marm.config import ModelConfig
from marm.events import TASKS, EventBatch
from marm.items import ItemFeatures
from marm.memory import RAW_STEP, InProcessMemory, Namespace, UserRows
from marm.model_factory import Model, build_model
from marm.sequence import raw_rows

NOW_MS = 1_700_000_000_000
INT64 = np.iinfo(np.int64)


def make_events(num_events: int = 40, num_users: int = 5, seed: int = 0) -> EventBatch:
    """Events in time order with some unknown labels."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((num_events, len(TASKS))) < 0.5).astype(np.float32)
    labels[:, -1] = rng.exponential(20.0, num_events)
    labels[rng.random(labels.shape) < 0.15] = np.nan
    return EventBatch(
        user_id=rng.integers(0, num_users, num_events),
        item_id=rng.integers(0, 30, num_events),
        timestamp_ms=NOW_MS - 10_000_000 + np.arange(num_events) * 1000,
        event_key=rng.integers(0, 2**63, num_events).astype(np.uint64),
        author_id=rng.integers(1, 6, num_events),
        tag_id=rng.integers(1, 4, num_events),
        duration_ms=rng.integers(1000, 90_000, num_events),
        context_id=rng.integers(0, 3, num_events).astype(np.int32),
        labels=labels,
    )


def replaced(events: EventBatch, **columns: NDArray) -> EventBatch:
    """``events`` with some columns exchanged."""
    old = {field.name: getattr(events, field.name) for field in fields(events)}
    return EventBatch(**{**old, **columns})


def make_rows(
    namespace: Namespace, stamps: list[int], mark: int = 0, keys: list[int] | None = None
) -> NDArray[np.void]:
    """Rows at ``stamps``; ``mark`` is their step and their memory, raw where it is RAW_STEP."""
    rows = np.zeros(len(stamps), namespace.row_dtype)
    rows["timestamp_ms"] = stamps
    rows["event_key"] = np.array(stamps if keys is None else keys, np.uint64)
    rows["item_id"] = np.arange(len(stamps)) + 100
    rows["written_step"] = mark
    rows["memory"] = 0 if mark == RAW_STEP else mark
    return rows


def rows_of_user(
    namespace: Namespace, user_id: int, num_rows: int, seed: int = 1, raw: bool = False
) -> UserRows:
    """One user's history before NOW_MS with random memory."""
    rng = np.random.default_rng(seed)
    rows = raw_rows(make_events(num_rows, 1, seed), namespace.row_dtype)
    if not raw:
        rows["memory"] = rng.normal(size=rows["memory"].shape)
        rows["written_step"] = 3
    return UserRows(np.array([user_id]), np.array([0, num_rows]), rows)


def fetch_for(events: EventBatch, memory: InProcessMemory, n: int) -> UserRows:
    """Rows from before each user's first event of ``events``."""
    users = np.unique(events.user_id)
    before = [events.timestamp_ms[events.user_id == user].min() for user in users]
    return memory.fetch(users, n, np.array(before, np.int64))


def make_items(num_items: int, seed: int = 2) -> ItemFeatures:
    """Items with random attributes."""
    rng = np.random.default_rng(seed)
    return ItemFeatures(
        rng.integers(0, 10**15, num_items),
        rng.integers(0, 9, num_items),
        rng.integers(0, 9, num_items),
        rng.integers(0, 90_000, num_items),
    )


def small_config(stage: str = "ranking", **settings: Any) -> ModelConfig:
    """A model that is small enough to check number by number."""
    namespace = settings.pop("namespace", Namespace(depth=2, dim=8, dtype="float32"))
    defaults: dict[str, Any] = {
        "depth": namespace.depth,
        "attention_dim": namespace.dim,
        "feature_dim": 6,
        "history_length": 10,
        "num_slots": 512,
        "num_experts": 2,
        "expert_dim": 8,
        "output_dim": 5,
    }
    return ModelConfig(stage=stage, namespace=namespace, **{**defaults, **settings})


def small_model(stage: str = "ranking", seed: int = 0, **settings: Any) -> Model:
    """A model of `small_config` whose every parameter is random."""
    torch.manual_seed(seed)
    model = build_model(small_config(stage, **settings))
    with torch.no_grad():
        for parameter in model.net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
        model.table.weight.mul_(10)
    return model
