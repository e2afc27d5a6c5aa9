"""Recall and NDCG of retrieval, test-then-train, beside baselines on the same events.

Of a sample of the positive events that are evaluated, the true item is ranked among all items of
the stream so far, as the index of a server would rank it: by inner product with the user's vectors
at that moment, without the items of the rows that retrieval reads, which a server leaves out too.
Popularity and item-to-item rank the same items for the same events; they know the stream up to the
batch before. Item vectors are those of at most `REFRESH_STEPS` steps ago, and the catalog at most a
twentieth larger than it was then; the vector of the true item is that of the moment.

Every worker knows the items and the counts of all: what was learned is exchanged at every step.

Shape legend: B events, K user vectors, V vector width, M items.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from marm.addressing import combine64
from marm.events import EventBatch
from marm.items import ItemFeatures
from marm.memory import UserRows
from marm.ranking_metrics import ndcg_at_k, ranks_of_true, recall_at_k
from marm.retriever import TEMPERATURE, Retriever
from marm.stage_model import StepOutput
from train.batch_history import BatchHistory
from train.collective import Collective
from train.item_to_item import ItemToItem
from train.item_vectors import item_vectors
from train.metrics import EvaluationWindow
from train.popularity import Popularity
from train.rank_sample import RankSample
from train.seen_catalog import SeenCatalog

CUTOFFS = (10, 50, 200)
METHODS = ("retrieval", "popularity", "item_to_item")
MAX_SAMPLED_EVENTS = 4_000
"""A recall of 0.3 is known to within 0.014 (95%)."""

REFRESH_STEPS = 100
SEED_ITEMS = 5
"""Item-to-item starts from so many newest positive items of the user."""

_GROWTH = 1.05
_SCORES_AT_ONCE = 4_000_000
_SAMPLE_SALT = 0x5EED
_ITEM, _WANTED, _POSITIVE, _FOLLOWS, _BEFORE = slice(0, 4), 4, 5, 6, 7
"""What workers tell each other of an event: the item's columns, whether it is evaluated, whether it
is positive, and if another positive event of the user came before it, that one's item."""


class RetrievalMetrics:
    """Ranks a sample of events at prediction time and follows the stream for the baselines."""

    def __init__(
        self, model: Retriever, evaluated: EvaluationWindow, collective: Collective
    ) -> None:
        self._model, self._evaluated, self._collective = model, evaluated, collective
        self.sample = RankSample(MAX_SAMPLED_EVENTS, len(METHODS))
        self.catalog, self.popularity = SeenCatalog(), Popularity()
        self.item_to_item = ItemToItem()
        self._vectors_MV: NDArray[np.float32] | None = None
        self._refreshed_step = 0

    @property
    def task(self) -> str:
        """The task whose positive events are looked for."""
        return self._model.config.positive_task

    def observe(self, events: EventBatch, rows: UserRows, output: StepOutput, step: int) -> None:
        """Rank what is sampled of a batch that was just predicted, then learn the batch; all
        workers call it."""
        config = self._model.config
        history = BatchHistory(
            events, rows, config.namespace.sequence, self.task, config.history_length
        )
        wanted = history.positive_B & self._evaluated.contains(events.timestamp_ms)
        told = self._exchange(events, history, wanted)
        # Every worker computes the vectors at the same steps, whoever has something to rank.
        if (told[:, _WANTED] > 0).any():
            self._refresh(step)
            hashes = sample_hashes(events)
            index = np.flatnonzero(wanted & self.sample.wants(hashes))
            for part in self._blocks(index):
                ranks_BS, candidates_B = self._ranks(events, part, history, output)
                self.sample.add(hashes[part], ranks_BS, candidates_B)
        self._learn(told)

    def forget_vectors(self) -> None:
        """Compute item vectors anew when they are next needed: at a checkpoint, so that a run that
        resumes there ranks with the same vectors as one that goes on."""
        self._vectors_MV = None

    def _refresh(self, step: int) -> None:
        vectors = self._vectors_MV
        is_fresh = step - self._refreshed_step < REFRESH_STEPS
        if vectors is not None and is_fresh and len(self.catalog) <= _GROWTH * len(vectors):
            return
        self._vectors_MV, self._refreshed_step = (
            item_vectors(self._model, self.catalog.items()),
            step,
        )

    def _blocks(self, index: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """``index`` in parts whose scores fit in memory; nothing while there are no items."""
        if self._vectors_MV is None or not len(self._vectors_MV):
            return []
        size = max(1, _SCORES_AT_ONCE // len(self._vectors_MV))
        return [index[start : start + size] for start in range(0, len(index), size)]

    def _ranks(
        self,
        events: EventBatch,
        index: NDArray[np.int64],
        history: BatchHistory,
        output: StepOutput,
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Ranks of the true items by each method, and among how many items."""
        vectors_MV = self._vectors_MV
        assert vectors_MV is not None
        assert output.user_vectors_BKV is not None
        num_items, num_known = len(vectors_MV), len(self.catalog)
        popularity = self.popularity.scores(num_known)
        true_place = self.catalog.places(events.item_id[index])
        allowed_BM = np.ones((len(index), num_items), np.bool_)
        after_B = np.zeros((len(index), num_known))
        for row, (event, place) in enumerate(zip(index.tolist(), true_place.tolist(), strict=True)):
            past = history.past(event)
            hidden = np.append(self.catalog.places(past.items), place)
            allowed_BM[row, hidden[(hidden >= 0) & (hidden < num_items)]] = False
            seeds = self.catalog.places(past.items[past.positive][-SEED_ITEMS:])
            # Popularity is below 1: it orders what follows equally often.
            after_B[row] = self.item_to_item.scores(seeds[seeds >= 0], num_known) + popularity
        users_BKV = output.user_vectors_BKV[torch.from_numpy(index)].float().cpu().numpy()
        by_method = [
            (output.scores_BT[index, 0] * TEMPERATURE, (users_BKV @ vectors_MV.T).max(axis=1)),
            _true_and_others(np.broadcast_to(popularity, after_B.shape), true_place, num_items),
            _true_and_others(after_B, true_place, num_items),
        ]
        ranks = [ranks_of_true(true_B, scores_BM, allowed_BM) for true_B, scores_BM in by_method]
        return np.stack(ranks, axis=1), allowed_BM.sum(axis=1) + 1

    def _exchange(
        self, events: EventBatch, history: BatchHistory, wanted: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """What all workers have to learn of their batches, in the columns named above."""
        follows, item_before = history.consecutive_positives()
        told = np.zeros((len(events), _BEFORE + 1), np.int64)
        columns = (events.item_id, events.author_id, events.tag_id, events.duration_ms)
        told[:, _ITEM] = np.stack(columns, axis=1)
        told[:, _WANTED], told[:, _POSITIVE] = wanted, history.positive_B
        told[follows, _FOLLOWS], told[follows, _BEFORE] = 1, item_before
        device = self._model.table.weight.device
        return self._collective.concat(torch.from_numpy(told).to(device)).cpu().numpy()

    def _learn(self, told: NDArray[np.int64]) -> None:
        places = self.catalog.add(ItemFeatures(*told[:, _ITEM].T))
        self.popularity.add(places[(told[:, _POSITIVE] > 0) & (places >= 0)])
        before = self.catalog.places(told[:, _BEFORE])
        pairs = (told[:, _FOLLOWS] > 0) & (before >= 0) & (places >= 0)
        self.item_to_item.add(before[pairs], places[pairs])

    def figures(self) -> dict[str, float]:
        """``recall@k`` and ``ndcg@k`` of retrieval, the same of the baselines with their names
        before them, the number of events and the mean number of items ranked; over all workers,
        all of which call it. Nothing when no event was sampled."""
        together = RankSample(MAX_SAMPLED_EVENTS, len(METHODS))
        for state in self._collective.gather(self.sample.state()):
            together.extend(state)
        if not len(together):
            return {}
        figures = {
            "sampled_events": float(len(together)),
            "candidates": float(together.candidates.mean()),
        }
        for method, ranks_B in zip(METHODS, together.ranks_BS.T, strict=True):
            prefix = "" if method == METHODS[0] else f"{method}_"
            for k in CUTOFFS:
                figures[f"{prefix}recall@{k}"] = recall_at_k(ranks_B, k)
                figures[f"{prefix}ndcg@{k}"] = ndcg_at_k(ranks_B, k)
        return figures

    def shared_state(self) -> dict[str, NDArray]:
        """What is equal on all workers; `load_shared` reads it back."""
        return {
            "catalog": self.catalog.state(),
            "popularity": self.popularity.state(),
            **self.item_to_item.state(),
        }

    def load_shared(self, state: dict[str, NDArray]) -> None:
        """Continue from `shared_state`."""
        self.catalog.load(state["catalog"])
        self.popularity.load(state["popularity"])
        self.item_to_item.load(state)


def sample_hashes(events: EventBatch) -> NDArray[np.uint64]:
    """The hashes by which events are sampled, ``[B]``: those of `RankSample` are the smallest."""
    return combine64(_SAMPLE_SALT, events.user_id, events.event_key)


def _true_and_others(
    scores_BN: NDArray, true_place: NDArray[np.int64], num_items: int
) -> tuple[NDArray, NDArray]:
    """Scores of the true items, 0 for one never seen, and of the first ``num_items`` items."""
    if not scores_BN.shape[1]:
        return np.zeros(len(scores_BN)), scores_BN
    own_B = scores_BN[np.arange(len(scores_BN)), true_place]
    return np.where(true_place >= 0, own_B, 0.0), scores_BN[:, :num_items]
