"""Retrieval: the user id queries the user's rows, the user vectors query the item index."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from marm.memory import Namespace
from stages.history import History, MemoryReader, read_history
from stages.item_filters import ItemFilter, ItemLists
from stages.item_index import Found, ItemIndex, best_of
from stages.knobs import RetrievalKnobs
from stages.models import RetrievalModel
from stages.popular import PopularItems
from stages.request import Source, StageRequest, StageResult, empty_ids
from stages.turns import Turns

SEEN_AGAIN = "every item was seen before, so seen items are shown again"
NOTHING_PERMITTED = "the allow and block lists leave no item"


@dataclass(frozen=True)
class RetrievalStage:
    """One loaded version of a retrieval model, with the items it was published with."""

    variant: str
    version: int
    model: RetrievalModel
    memory: MemoryReader
    history_length: int
    depth: int
    index: ItemIndex
    popular: PopularItems
    turns: Turns = field(default_factory=Turns, repr=False, compare=False)

    @property
    def namespace(self) -> Namespace:
        """The memory that is read."""
        return self.memory.namespace

    def run(self, request: StageRequest, knobs: RetrievalKnobs) -> StageResult:
        """Find at most ``request.limit`` items the user may like.

        Fewer come back only when the lists permit fewer. Items seen before return when nothing else
        is left.

        Raises:
            TurnMissedError: its time was over before it could be computed.
            ValueError: when the user vectors are not finite.
        """
        history = read_history(self.memory, request, self.history_length, self.depth)
        history = history.at_depth(history.read.depth)  # vectors that no row has change nothing
        with self.turns.turn(request.deadline_ms):
            return self._found(request, history, knobs)

    def _found(self, request: StageRequest, history: History, knobs: RetrievalKnobs) -> StageResult:
        vectors_KV = self._user_vectors(request, history)
        seen = history.item_ids if knobs.filter_seen else empty_ids()
        found, source = self._find(vectors_KV, request, knobs, seen)
        notes = [history.note] if history.note else []
        if not len(found) and len(seen):
            found, source = self._find(vectors_KV, request, knobs, empty_ids())
            notes += [SEEN_AGAIN] if len(found) else []
        if not len(found) and len(self.popular):
            notes.append(NOTHING_PERMITTED)
        return StageResult(
            stage="retrieval",
            variant=self.variant,
            model_version=self.version,
            namespace=self.namespace,
            candidates=found.items,
            scores=found.scores,
            source=source,
            rows=history.read,
            num_in=len(self.index),
            reason="; ".join(notes),
        )

    def _user_vectors(self, request: StageRequest, history: History) -> NDArray[np.float32] | None:
        """``[K, V]``; None when there is nothing to make them from or to ask with them."""
        if not len(history.rows.rows) or not len(self.index):
            return None
        vectors_KV = self.model.user_vectors(
            history.rows, request.user_id, history.now_ms, request.context_id
        )
        if not np.isfinite(vectors_KV).all():
            raise ValueError(
                f"retrieval/{self.variant} version {self.version} gave a user vector that is not "
                "finite; pin an earlier version"
            )
        return vectors_KV

    def _find(
        self,
        vectors_KV: NDArray[np.float32] | None,
        request: StageRequest,
        knobs: RetrievalKnobs,
        seen: NDArray[np.int64],
    ) -> tuple[Found, Source]:
        of_request = ItemLists.of([request.exclude_item_ids, seen], request.allow_item_ids)
        item_filter = ItemFilter(knobs.lists, of_request)
        if vectors_KV is None:
            return self.popular.permitted(request.limit, item_filter), "popular"
        found = self.index.search(vectors_KV, request.limit, item_filter)
        return best_of(found, request.limit), "retrieval"
