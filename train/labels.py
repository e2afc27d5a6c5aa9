"""Labels that cannot be true: they are taken for not observed, and counted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from marm.events import BINARY_TASKS, EventBatch


def usable_labels(events: EventBatch) -> tuple[EventBatch, int]:
    """``events`` whose impossible labels are NaN, and how many there were.

    Impossible are an infinite label, a binary one outside [0, 1] and a negative watch time: one of
    them would spoil the weights or every figure of its task. Ingest and the event log refuse most
    of them; a source of another kind may bring them.
    """
    labels = events.labels
    upper = np.full(labels.shape[1], np.finfo(np.float32).max, np.float32)
    upper[: len(BINARY_TASKS)] = 1.0
    odd = (labels < 0.0) | (labels > upper)  # NaN is neither
    count = int(odd.sum())
    if not count:
        return events, 0
    return replace(events, labels=np.where(odd, np.float32(np.nan), labels)), count
