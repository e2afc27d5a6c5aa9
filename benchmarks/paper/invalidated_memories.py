"""Memories of changed histories beside that of a pass, from the beginning of a window on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.paper.changed_histories import (
    TREATMENTS,
    Changed,
    Overhead,
    StoredHistories,
    change_histories,
    stored_histories,
    treat,
)
from benchmarks.paper.datasets import Dataset
from benchmarks.paper.shadow_memory import ShadowMemories
from benchmarks.paper.trial import Predictions
from benchmarks.paper.watched_pass import Piece
from marm.config import ModelConfig
from marm.items import ItemFeatures
from marm.memory import Memory
from marm.memory_arrays import ArrayMemory
from train.data.seen_items import SeenItems
from train.rebuild.histories import gather_histories

REFRESHED = "refreshed"
"""The name of a memory of which nothing changed and every visible row was computed again."""

FORGOTTEN = "forgotten"
"""The name of a memory that has nothing from before the window: the most that a change can cost."""


class InvalidationWatch:
    """Changes histories at the first piece, and asks the model with all memories from then on."""

    def __init__(
        self, dataset: Dataset, memory: Memory, change: str, percents: Sequence[int], seed: int
    ) -> None:
        self._dataset, self._memory, self._seed = dataset, memory, seed
        self._change, self._percents = change, percents
        self._shadows: ShadowMemories | None = None
        self.overheads: dict[str, Overhead] = {}
        self.valid_by_layer: dict[int, list[float]] = {}
        self.returning = np.empty(0, np.int64)

    def watch(self, piece: Piece) -> None:
        """See `benchmarks.paper.watched_pass.Watch`."""
        if self._shadows is None:
            self._shadows = ShadowMemories(self._memories(piece))
        self._shadows.watch(piece)

    def predictions(self, window: str) -> dict[str, Predictions]:
        """By condition."""
        assert self._shadows is not None, "predictions() follows the pass"
        return self._shadows.scores.predictions(self._dataset, window)

    def _memories(self, piece: Piece) -> dict[str, Memory]:
        stored, items = self._past(piece)
        memories: dict[str, Memory] = {}
        nothing = self._changed(stored, 0, items, piece.model.config)
        treated = treat(nothing, "recomputed", piece.model, piece.step, everything=True)
        memories[REFRESHED], self.overheads[REFRESHED] = treated
        memories[FORGOTTEN] = ArrayMemory(piece.model.config.namespace)
        for percent in self._percents:
            changed = self._changed(stored, percent, items, piece.model.config)
            visible = changed.stored.histories.from_newest < piece.model.config.history_length
            self.valid_by_layer[percent] = [
                1.0 - float(depends[visible].mean()) for depends in changed.depends[1:]
            ]
            for treatment in TREATMENTS:
                if self._change == "remove" and treatment == "own_raw":
                    continue  # the rows of removed events are gone: the same as stale
                name = f"{percent}% {treatment}"
                treated = treat(changed, treatment, piece.model, piece.step)
                memories[name], self.overheads[name] = treated
        return memories

    def _past(self, piece: Piece) -> tuple[StoredHistories, ItemFeatures]:
        """Stored histories of the users who come back, and all items so far."""
        past = self._dataset.events.take(slice(0, piece.start))
        later = self._dataset.events.user_id[piece.start :]
        users = np.intersect1d(past.user_id, later)
        seen = SeenItems(ItemFeatures.empty())
        seen.complete(past)
        sequence = piece.model.config.namespace.sequence
        histories = gather_histories([past], users, sequence)
        if not len(histories.events):
            raise ValueError(
                "no user of the window has a history before it; evaluate a later or longer window"
            )
        self.returning = histories.user_ids
        return stored_histories(self._memory, histories), seen.items()

    def _changed(
        self, stored: StoredHistories, percent: int, items: ItemFeatures, config: ModelConfig
    ) -> Changed:
        reach = (
            *(layer * config.history_length for layer in range(config.depth)),
            config.receptive_field,
        )
        rng = np.random.default_rng((self._seed, percent))
        return change_histories(stored, self._change, percent / 100, items, reach, rng)
