"""One made-up request with a known answer: does a model still compute what it did when published?

A version's weights may be sound while the code that reads them hashes, encodes or attends
differently from the code that trained them; every score would be finite, and wrong. Training
records the answer of this request with a version, serving repeats it. It also shows that a version
can answer at all.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from marm.cascader import Cascader
from marm.events import WATCH_BUCKET_SHIFT
from marm.items import ItemFeatures
from marm.memory import RAW_STEP, Namespace, UserRows
from marm.model_factory import Model
from marm.ranker import Ranker

PROBE_USER = 7
PROBE_CONTEXT = 1
PROBE_NOW_MS = 1_000_000
_SECOND_MS = 1000


def probe_rows(namespace: Namespace, num_rows: int) -> UserRows:
    """Rows of the probe's user: every second one memorised, with every signal and every age."""
    rows = np.zeros(num_rows, namespace.row_dtype)
    position = np.arange(num_rows)
    rows["event_key"] = position + 1
    rows["item_id"] = position % 97 + 1
    rows["author_id"] = position % 13
    rows["tag_id"] = position % 5
    rows["context_id"] = position % 3
    rows["timestamp_ms"] = PROBE_NOW_MS - (num_rows - position) * _SECOND_MS
    rows["feedback"] = position % 64 | (position % 8) << WATCH_BUCKET_SHIFT
    rows["written_step"] = np.where(position % 2, 1, RAW_STEP)
    values = np.sin(np.arange(rows["memory"].size)).reshape(rows["memory"].shape)
    rows["memory"] = values * (position % 2)[:, None, None]
    return UserRows(np.array([PROBE_USER]), np.array([0, num_rows]), rows)


def probe_items(num_items: int) -> ItemFeatures:
    """Candidates of the probe."""
    ids = np.arange(1, num_items + 1, dtype=np.int64)
    return ItemFeatures(ids, ids % 11, ids % 5, ids * 700)


def probe(model: Model, num_rows: int = 8, num_items: int = 4) -> NDArray[np.float32]:
    """What ``model`` answers to the probe, flat: scores of its candidates, or the user vectors.

    ``num_rows`` beyond the model's history length are not read.
    """
    rows = probe_rows(model.config.namespace, min(num_rows, model.config.history_length))
    if isinstance(model, Ranker | Cascader):
        items = probe_items(num_items)
        return model.score(rows, PROBE_USER, items, PROBE_NOW_MS, PROBE_CONTEXT).ravel()
    return model.user_vectors(rows, PROBE_USER, PROBE_NOW_MS, PROBE_CONTEXT).ravel()
