"""Scores as training computes them when it evaluates: what served scores must equal.

Training predicts a batch of events, each with the rows from before it, through
`StageModel.training_forward`. Serving scores candidates through `Ranker.score` and its relatives,
along faster paths. For the same user, item, moment, rows and weights both must say the same.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from marm.events import TASKS, EventBatch
from marm.items import ItemFeatures
from marm.memory import UserRows
from marm.model_factory import Model
from marm.retriever import TEMPERATURE, Retriever


def offline_scores(
    model: Model,
    rows: UserRows,
    items: ItemFeatures,
    now_ms: int,
    context_id: int = 0,
) -> NDArray[np.float32]:
    """What training predicts for one exposure of every item at ``now_ms``, ``[M, T]``.

    Args:
        model: as published; nothing is learned.
        rows: rows of one user, of any time: those at ``now_ms`` and later are not seen.
        items: what is shown.
        now_ms: the moment of all exposures.
        context_id: where they are shown.

    Returns:
        Predictions of `StageModel.tasks`: probabilities, seconds for watch time, and for a
        retrieval model the best inner product of a user vector with the item's.
    """
    (user_id,) = rows.user_ids.tolist()
    events = _exposures(user_id, items, now_ms, context_id)
    inputs = model.inputs.for_reading(events, rows)
    with torch.inference_mode():
        output = model.training_forward(model.net, model.embed(inputs), events.labels)
    if isinstance(model, Retriever):
        return (output.scores_BT * TEMPERATURE).astype(np.float32)
    return output.scores_BT


def _exposures(user_id: int, items: ItemFeatures, now_ms: int, context_id: int) -> EventBatch:
    count = len(items)
    return EventBatch(
        user_id=np.full(count, user_id, np.int64),
        item_id=items.item_id,
        timestamp_ms=np.full(count, now_ms, np.int64),
        event_key=np.arange(count, dtype=np.uint64),
        author_id=items.author_id,
        tag_id=items.tag_id,
        duration_ms=items.duration_ms,
        context_id=np.full(count, context_id, np.int32),
        labels=np.full((count, len(TASKS)), np.nan, np.float32),
    )
