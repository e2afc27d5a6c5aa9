"""From events and rows to model inputs: hashing, masks and padding, in numpy.

Everything here depends on data only, never on weights, so it can run ahead of training in another
thread. Shape legend: B queries, U users, N slab length, L layers, D row width, K item features,
S feedback signals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from marm.config import SEQUENCE_METHODS, ModelConfig
from marm.events import (
    BINARY_TASKS,
    FEEDBACK_KNOWN_BIT,
    WATCH_BUCKET_SHIFT,
    EventBatch,
    pack_feedback,
)
from marm.interest.user_sequence import BlockEvents, UserSequence, lay_out
from marm.items import ItemFeatures
from marm.memory import UserRows
from marm.sequence import (
    Queries,
    Slab,
    View,
    enters_sequence,
    newest_memorised,
    newest_of,
    past_block,
    view_block,
    view_slab,
)
from marm.sparse import FEATURE_SALTS, SparseTable
from marm.transitions import Transitions

_WATCH_MASK = np.uint32(0xF)


@dataclass(frozen=True)
class Feedback:
    """Feedback of rows as the model sees it."""

    signals: NDArray[np.float32]  # [..., S] 1 where observed positive
    watch_bucket: NDArray[np.int64]  # [...] 0: unknown
    known: NDArray[np.bool_]  # [...] whether anything was observed


@dataclass(frozen=True)
class SlabInputs:
    """Stored rows of the users of a batch."""

    slots_UNK: NDArray[np.int64]
    feedback: Feedback
    memory_UNLD: NDArray[np.float32]
    memorised_BN: NDArray[np.bool_]
    newest_BN: NDArray[np.bool_] | None  # `newest_memorised`, where there are errors
    view: View
    user_row_B: NDArray[np.int64]


@dataclass(frozen=True)
class BlockInputs:
    """The batch's own events as keys of one another."""

    slots_BK: NDArray[np.int64]
    feedback: Feedback
    view: View
    past_BB: NDArray[np.bool_] | None  # `past_block`, where there are errors
    newest_BB: NDArray[np.bool_] | None  # the newest of it, for a model that reads errors


@dataclass(frozen=True)
class CategoryInputs:
    """Tags and authors of one request's candidates ``[M]`` and stored rows ``[N]``."""

    candidate_tag: NDArray[np.int64]
    candidate_author: NDArray[np.int64]
    row_tag: NDArray[np.int64]
    row_author: NDArray[np.int64]


@dataclass(frozen=True)
class ModelInputs:
    """All a forward pass needs besides weights."""

    target_slots_BK: NDArray[np.int64]  # item features of the targets
    user_slots_B: NDArray[np.int64]
    context_slots_B: NDArray[np.int64]
    slab: SlabInputs
    block: BlockInputs | None
    categories: CategoryInputs | None = None  # of one user's candidates
    sequence: UserSequence | None = None  # for the methods of `SEQUENCE_METHODS`
    transition_slots_B: NDArray[np.int64] | None = None  # for a model that keeps transitions

    def __len__(self) -> int:
        return len(self.target_slots_BK)


class InputBuilder:
    """Builds `ModelInputs` for one model configuration; holds no weights."""

    def __init__(self, config: ModelConfig, table: SparseTable) -> None:
        self._config, self._table = config, table
        self._signal_bits = np.array(
            [BINARY_TASKS.index(signal) for signal in config.feedback_signals], np.uint32
        )
        self._transitions = Transitions(config) if config.keeps_transitions else None
        self._needs_sequence = any(one.method in SEQUENCE_METHODS for one in config.interests)

    def for_training(self, events: EventBatch, rows: UserRows) -> ModelInputs:
        """Inputs of a micro-batch.

        ``rows`` holds, for each distinct user of the batch, stored rows from before his first event
        in it; the batch's own events are keys of one another.
        """
        user_row = _positions(rows.user_ids, events.user_id)
        config = self._config
        entering = enters_sequence(events, config.namespace.sequence)
        view, predecessors = view_block(events, user_row, entering, config.history_length)
        feedback = self._feedback(pack_feedback(events.labels))
        row_slots = self._row_slots(
            events.item_id, events.author_id, events.tag_id, events.context_id
        )
        queries = Queries(user_row, events.timestamp_ms)
        slab = Slab.of(rows, config.history_length)
        slab_inputs = self._slab_inputs(slab, queries, predecessors)
        own = BlockEvents(view, entering, events.event_key)
        past = past_block(events, user_row, entering) if config.sees_whole_past else None
        newest = None
        if past is not None and config.reads_errors:
            newest = newest_of(past, events.timestamp_ms[None, :])
        return self._inputs(
            events,
            slab_inputs,
            BlockInputs(row_slots, feedback, view, past, newest),
            self._sequence(slab, slab_inputs.view, queries, own, predecessors),
            self._transition_slots(events, slab, slab_inputs.view, queries, view),
        )

    def for_reading(self, events: EventBatch, rows: UserRows) -> ModelInputs:
        """Inputs of a micro-batch whose own events are already among ``rows`` (time travel)."""
        queries = Queries(_positions(rows.user_ids, events.user_id), events.timestamp_ms)
        # Rows at or after a query's time may hide among a user's newest: look through all of them.
        longest = int(rows.counts.max(initial=0))
        newer = np.zeros(len(events), np.int64)
        slab = Slab.of(rows, longest)
        slab_inputs = self._slab_inputs(slab, queries, newer)
        sequence = self._sequence(slab, slab_inputs.view, queries, None, newer)
        transitions = self._transition_slots(events, slab, slab_inputs.view, queries, None)
        return self._inputs(events, slab_inputs, None, sequence, transitions)

    def for_candidates(
        self, rows: UserRows, candidates: ItemFeatures, now_ms: int, context_id: int
    ) -> ModelInputs:
        """Inputs of one request: one user's rows, all ``candidates`` asked at ``now_ms``."""
        if len(rows.user_ids) != 1:
            raise ValueError(
                f"a request is scored for exactly one user, got rows of {len(rows.user_ids)}"
            )
        query = Queries(np.zeros(1, np.int64), np.array([now_ms], np.int64))
        slots = self._item_slots(
            candidates.item_id, candidates.author_id, candidates.tag_id, candidates.duration_ms
        )
        slab = Slab.of(rows, int(rows.counts[0]))
        newer = np.zeros(1, np.int64)
        slab_inputs = self._slab_inputs(slab, query, newer)
        transitions = None
        if self._transitions is not None:
            liked = self._transitions.liked_in_slab(slab, slab_inputs.view, query)
            transitions = self._transitions.slots(liked, candidates.tag_id)
        return ModelInputs(
            slots,
            np.repeat(self._table.slots("user", rows.user_ids), len(candidates)),
            np.repeat(self._table.slots("context", [context_id]), len(candidates)),
            slab_inputs,
            None,
            CategoryInputs(
                candidates.tag_id,
                candidates.author_id,
                slab.rows["tag_id"][0],
                slab.rows["author_id"][0],
            ),
            self._sequence(slab, slab_inputs.view, query, None, newer),
            transitions,
        )

    def item_slots(self, items: ItemFeatures) -> NDArray[np.int64]:
        """Table rows of item features, ``[M, K]``."""
        return self._item_slots(items.item_id, items.author_id, items.tag_id, items.duration_ms)

    def _inputs(
        self,
        events: EventBatch,
        slab: SlabInputs,
        block: BlockInputs | None,
        sequence: UserSequence | None,
        transition_slots_B: NDArray[np.int64] | None,
    ) -> ModelInputs:
        return ModelInputs(
            self._item_slots(events.item_id, events.author_id, events.tag_id, events.duration_ms),
            self._table.slots("user", events.user_id),
            self._table.slots("context", events.context_id),
            slab,
            block,
            sequence=sequence,
            transition_slots_B=transition_slots_B,
        )

    def _transition_slots(
        self, events: EventBatch, slab: Slab, view: View, queries: Queries, block: View | None
    ) -> NDArray[np.int64] | None:
        if self._transitions is None:
            return None
        liked = self._transitions.liked_in_slab(slab, view, queries)
        if block is not None:
            liked = self._transitions.liked(events, block, liked)
        return self._transitions.slots(liked, events.tag_id)

    def _sequence(
        self,
        slab: Slab,
        view: View,
        queries: Queries,
        block: BlockEvents | None,
        newer_B: NDArray[np.int64],
    ) -> UserSequence | None:
        if not self._needs_sequence:
            return None
        return lay_out(slab, view, queries, block, newer_B, self._config.history_length)

    def _slab_inputs(self, slab: Slab, queries: Queries, newer_B: NDArray[np.int64]) -> SlabInputs:
        config = self._config
        view = view_slab(slab, queries, newer_B, config.history_length)
        columns = slab.rows
        memory = single_precision(columns["memory"][:, :, : config.depth])
        return SlabInputs(
            self._row_slots(
                columns["item_id"], columns["author_id"], columns["tag_id"], columns["context_id"]
            ),
            self._feedback(columns["feedback"]),
            memory,
            view.visible & slab.memorised[queries.user_row],
            newest_memorised(slab, queries) if config.sees_whole_past else None,
            view,
            queries.user_row,
        )

    def _feedback(self, packed: NDArray[np.uint32]) -> Feedback:
        bits = (packed[..., None] >> self._signal_bits) & np.uint32(1)
        bucket = (packed >> np.uint32(WATCH_BUCKET_SHIFT)) & _WATCH_MASK
        known = (packed >> np.uint32(FEEDBACK_KNOWN_BIT)) & np.uint32(1)
        return Feedback(bits.astype(np.float32), bucket.astype(np.int64), known.astype(np.bool_))

    def _item_slots(
        self, item: NDArray, author: NDArray, tag: NDArray, duration_ms: NDArray
    ) -> NDArray[np.int64]:
        octave = np.ceil(np.log2(1.0 + np.maximum(duration_ms, 0) / 1000.0)).astype(np.int64)
        columns = {"item": item, "author": author, "tag": tag, "duration": octave}
        return self._stack(columns)

    def _row_slots(
        self, item: NDArray, author: NDArray, tag: NDArray, context: NDArray
    ) -> NDArray[np.int64]:
        columns = {"item": item, "author": author, "tag": tag, "context": context}
        return self._stack(columns)

    def _stack(self, columns: dict[str, NDArray]) -> NDArray[np.int64]:
        used = [name for name in FEATURE_SALTS if name in columns]
        return np.stack(
            [
                self._table.slots(name, columns[name])
                for name in used
                if name in self._config.features
            ],
            axis=-1,
        )


def single_precision(x: NDArray) -> NDArray[np.float32]:
    """``x`` as float32. torch converts half precision by vector, numpy one by one."""
    if x.dtype != np.float16:
        return x.astype(np.float32)
    return torch.from_numpy(x).float().numpy()


def _positions(user_ids: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    order = np.argsort(user_ids, kind="stable")
    at = np.searchsorted(user_ids[order], wanted)
    position = order[np.minimum(at, len(order) - 1)] if len(order) else at
    if len(wanted) and (not len(order) or not np.array_equal(user_ids[position], wanted)):
        raise ValueError("rows must hold an entry, possibly empty, for every user of the batch")
    return position
