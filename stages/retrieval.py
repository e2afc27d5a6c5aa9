"""Retrieval: the user id queries the user's rows, the user vector queries the item index."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marm.memory import Namespace
from stages.history import History, MemoryReader, read_history
from stages.item_index import Found, ItemIndex
from stages.knobs import RetrievalKnobs
from stages.models import RetrievalModel
from stages.popular import PopularItems
from stages.request import Source, StageRequest, StageResult


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

    @property
    def namespace(self) -> Namespace:
        """The memory that is read."""
        return self.memory.namespace

    def run(self, request: StageRequest, knobs: RetrievalKnobs) -> StageResult:
        """Find at most ``request.limit`` items the user may like."""
        history = read_history(self.memory, request, self.history_length, self.depth)
        banned = np.concatenate(
            [request.exclude_item_ids, np.array(knobs.blocked_item_ids, np.int64)]
        )
        hidden = np.union1d(banned, history.item_ids) if knobs.filter_seen else np.unique(banned)
        found, source = self._find(request, history, hidden)
        reason = ""
        if not len(found) and len(hidden) > len(banned):
            found, source = self._find(request, history, np.unique(banned))
            reason = "every item was seen before, so seen items are shown again"
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
            reason=reason,
        )

    def _find(
        self, request: StageRequest, history: History, hidden: NDArray[np.int64]
    ) -> tuple[Found, Source]:
        if not len(history.rows.rows) or not len(self.index):
            return self.popular.top(request.limit, hidden), "popular"
        vector_V = self.model.user_vector(
            history.rows, request.user_id, history.now_ms, request.context_id
        )
        found = self.index.search(vector_V[None, :], request.limit + len(hidden))[0]
        if not np.isfinite(found.scores).all():
            raise ValueError(
                f"retrieval/{self.variant} version {self.version} gave a user vector that is not "
                "finite; pin an earlier version"
            )
        allowed = np.flatnonzero(~np.isin(found.items.item_id, hidden))[: request.limit]
        return Found(found.items.take(allowed), found.scores[allowed]), "retrieval"
