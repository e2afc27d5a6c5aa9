"""Events: what a user did with an item, and the tasks that are learned from it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

BINARY_TASKS = ("click", "long_view", "like", "comment", "forward", "follow")
WATCH_TIME = "watch_time"
TASKS = (*BINARY_TASKS, WATCH_TIME)
"""All tasks, in the column order of ``EventBatch.labels``. Watch time is in seconds."""

FEEDBACK_KNOWN_BIT = len(BINARY_TASKS)
WATCH_BUCKET_SHIFT = 8
NUM_WATCH_BUCKETS = 16


@dataclass(frozen=True)
class EventBatch:
    """``B`` events as columns. ``labels[:, t]`` is task ``TASKS[t]``; NaN means not observed.

    Within a user, ``timestamp_ms`` orders events. Two events of a user at the same millisecond are
    simultaneous: neither is history of the other.
    """

    user_id: NDArray[np.int64]
    item_id: NDArray[np.int64]
    timestamp_ms: NDArray[np.int64]
    event_key: NDArray[np.uint64]
    author_id: NDArray[np.int64]  # 0: unknown
    tag_id: NDArray[np.int64]  # 0: unknown
    duration_ms: NDArray[np.int64]  # 0: unknown
    context_id: NDArray[np.int32]  # page, tab, ... of the exposure; 0: unknown
    labels: NDArray[np.float32]  # [B, len(TASKS)]

    def __len__(self) -> int:
        return len(self.user_id)

    def take(self, index: NDArray | slice) -> EventBatch:
        """The events at ``index`` (integers, a boolean mask or a slice), in that order."""
        return EventBatch(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @staticmethod
    def empty() -> EventBatch:
        """A batch of no events."""
        return EventBatch(
            **{name: np.empty(0, dtype) for name, dtype in EVENT_DTYPES.items()},
            labels=np.empty((0, len(TASKS)), np.float32),
        )

    @staticmethod
    def concat(batches: list[EventBatch]) -> EventBatch:
        """All events of ``batches``, in order."""
        if not batches:
            return EventBatch.empty()
        return EventBatch(
            **{
                f.name: np.concatenate([getattr(b, f.name) for b in batches])
                for f in fields(EventBatch)
            }
        )


EVENT_DTYPES: dict[str, type[np.generic]] = {
    "user_id": np.int64,
    "item_id": np.int64,
    "timestamp_ms": np.int64,
    "event_key": np.uint64,
    "author_id": np.int64,
    "tag_id": np.int64,
    "duration_ms": np.int64,
    "context_id": np.int32,
}
"""Column types of an event, without its labels."""


def pack_feedback(labels_BT: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Feedback of each event in 32 bits, as stored in a row of memory.

    Bit ``i`` is set when ``BINARY_TASKS[i]`` was observed positive, bit ``FEEDBACK_KNOWN_BIT`` when
    any label was observed, and bits 8..11 hold ``1 + floor(log2(1 + watch seconds))`` capped at 15,
    or 0 when watch time was not observed. Unknown feedback is 0, never a negative in disguise.
    """
    packed = np.zeros(len(labels_BT), np.uint32)
    for bit in range(len(BINARY_TASKS)):
        packed |= (labels_BT[:, bit] > 0).astype(np.uint32) << np.uint32(bit)
    known = ~np.isnan(labels_BT).all(axis=1)
    packed |= known.astype(np.uint32) << np.uint32(FEEDBACK_KNOWN_BIT)
    watch_s = labels_BT[:, TASKS.index(WATCH_TIME)]
    seen = ~np.isnan(watch_s)
    octave = np.floor(np.log2(1.0 + np.where(seen, np.maximum(watch_s, 0.0), 0.0)))
    bucket = np.where(seen, np.minimum(1 + octave, NUM_WATCH_BUCKETS - 1), 0).astype(np.uint32)
    return packed | (bucket << np.uint32(WATCH_BUCKET_SHIFT))


def merge_feedback(old: NDArray[np.uint32], new: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Feedback after a second report of the same event: signals add up, the longer watch wins."""
    low_mask = np.uint32((1 << WATCH_BUCKET_SHIFT) - 1)
    watch = np.maximum(old >> np.uint32(WATCH_BUCKET_SHIFT), new >> np.uint32(WATCH_BUCKET_SHIFT))
    return ((old | new) & low_mask) | (watch << np.uint32(WATCH_BUCKET_SHIFT))


def merge_feedback_runs(
    feedback: NDArray[np.uint32], starts: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """`merge_feedback` over whole runs of reports of one event each; ``starts`` are where the runs
    begin."""
    shift = np.uint32(WATCH_BUCKET_SHIFT)
    low_mask = np.uint32((1 << WATCH_BUCKET_SHIFT) - 1)
    signals = np.bitwise_or.reduceat(feedback & low_mask, starts)
    watch = np.maximum.reduceat(feedback >> shift, starts)
    return signals | (watch << shift)
