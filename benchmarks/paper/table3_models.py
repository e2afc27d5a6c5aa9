"""The models of all stages as one system that answers users and learns from what they do.

What production spreads over trainers, a memory and servers is here in one process: the real
training loop (`train.stream.StreamTrainer`) keeps models and memory up to date, and the models
answer through the functions that serving calls, with the weights and rows of the moment.

Shape legend: M items, K user vectors, V vector width.
"""

from __future__ import annotations

import copy

import numpy as np
from numpy.typing import NDArray

from benchmarks.paper.trial import EventsInMemory
from cache_actors.event_log.offsets import LogOffsets
from marm.cascader import Cascader
from marm.config import STAGES
from marm.events import EventBatch
from marm.items import ItemCatalog, ItemFeatures
from marm.memory import UserRows
from marm.memory_arrays import ArrayMemory
from marm.model_factory import Model
from marm.ranker import Ranker
from marm.retriever import Retriever
from marm.scoring_plan import ScoringPlan
from marm.supervised import SupervisedModel
from stages.fusion import best_first
from train.collective import SingleWorker
from train.config import TrainConfig
from train.item_vectors import item_vectors
from train.metrics import EvaluationWindow
from train.stream import Hooks, StreamTrainer

CONTEXT_ID = 1
"""The page on which users live on."""

NOTHING_EVALUATED = EvaluationWindow(1, 0)

_BEHIND_ALL = 4.0  # inner products of unit vectors differ by 2 at most


class LiveModels:
    """One configuration's retrieval, cascading and ranking models with the memory they share."""

    def __init__(
        self,
        config: TrainConfig,
        items: ItemFeatures,
        evaluated: EvaluationWindow = NOTHING_EVALUATED,
        memory: ArrayMemory | None = None,
    ) -> None:
        """Untrained models that know ``items``, and a trainer.

        Args:
            config: of all three stages.
            items: what can be retrieved.
            evaluated: for `figures`.
            memory: what models read and training writes; an empty one by default.

        Raises:
            ValueError: when ``config`` lacks a stage.
        """
        stages = [model.stage for model in config.models]
        if len(stages) != len(STAGES):
            raise ValueError(f"all of {STAGES} need a model, got {stages}; use three_stages")
        # No query looks further back than the longest history.
        self.memory = memory or ArrayMemory(config.namespace, config.history_length)
        self._source, self._catalog = GrowingEvents(), ItemCatalog(items)
        self.trainer = StreamTrainer(config, self.memory, self._source, SingleWorker(), evaluated)
        self._item_vectors_MV = self._popularity_M = np.empty(0, np.float32)

    def learn(self, events: EventBatch) -> None:
        """Stream ``events`` (in time order, later than all before): predict, save, learn."""
        for learner in self.trainer.learners:
            learner.model.train()
        self._source.add(events)
        self.trainer.run(Hooks.nothing())
        self.refresh()

    def fork(self) -> LiveModels:
        """The same models and memory, apart from now on, as if resumed from a checkpoint."""
        now = self.trainer
        other = LiveModels(now.config, self._catalog.items, memory=copy.deepcopy(self.memory))
        for old, new in zip(now.learners, other.trainer.learners, strict=True):
            state = old.state()
            assert state is not None, "a single worker has the whole state"
            # A copy: an optimiser goes on with the very tensors that it is given.
            new.load_state(copy.deepcopy(state))
        other.trainer.restore(
            now.step, now.events_seen, now.published_step, now.feed_state, now.started_s
        )
        other.refresh()
        return other

    def refresh(self) -> None:
        """Answer with the weights as they are now."""
        for learner in self.trainer.learners:
            learner.model.eval()
            if isinstance(learner.model, SupervisedModel):
                learner.model.freeze(ScoringPlan())
        self._item_vectors_MV = item_vectors(self._retriever, self._catalog.items)
        self._popularity_M = self._retriever.popularity(self._catalog.items)

    def figures(self) -> dict[str, float]:
        """Test-then-train figures of the events that are evaluated."""
        evaluation, task = self.trainer.metrics.evaluation, self._retriever.config.positive_task
        figures: dict[str, float] = {}
        for stage in ("cascading", "ranking"):
            found = evaluation[stage].summarize().get(task, {})
            figures |= {f"{stage}_{name}": found[name] for name in ("auc", "gauc") if name in found}
        ranked = self.trainer.retrieval_metrics
        if ranked is not None:
            recalls = {k: v for k, v in ranked.figures().items() if k.startswith("recall@")}
            figures |= {f"retrieval_{name}": value for name, value in recalls.items()}
        return figures

    def find(self, user_id: int, now_ms: int, limit: int) -> NDArray[np.int64]:
        """Ids of the ``limit`` items nearest to the user's vectors among all, best first; items of
        the rows that retrieval reads come last, as a server leaves them out."""
        retriever = self._retriever
        rows = self._rows(user_id, retriever)
        if len(rows.rows):
            vectors_KV = retriever.user_vectors(rows, user_id, now_ms, CONTEXT_ID)
            scores_M = (vectors_KV @ self._item_vectors_MV.T).max(axis=0)
            seen = np.isin(self._catalog.items.item_id, rows.rows["item_id"])
            scores_M = scores_M - _BEHIND_ALL * seen.astype(np.float32)
        else:
            scores_M = self._popularity_M
        return self._catalog.items.item_id[best_first(scores_M, limit)]

    def preselect(
        self, user_id: int, item_ids: NDArray[np.int64], now_ms: int
    ) -> NDArray[np.float32]:
        """The cascading model's score of each item, ``[M]``."""
        model = self._model("cascading")
        assert isinstance(model, Cascader)
        items = self._catalog.lookup(item_ids)
        return model.score(self._rows(user_id, model), user_id, items, now_ms, CONTEXT_ID)

    def rank(self, user_id: int, item_ids: NDArray[np.int64], now_ms: int) -> NDArray[np.float32]:
        """The ranking model's prediction of its first task for each item, ``[M]``."""
        model = self._model("ranking")
        assert isinstance(model, Ranker)
        items = self._catalog.lookup(item_ids)
        return model.score(self._rows(user_id, model), user_id, items, now_ms, CONTEXT_ID)[:, 0]

    def _rows(self, user_id: int, model: Model) -> UserRows:
        return self.memory.fetch(np.array([user_id]), model.config.history_length)

    def _model(self, stage: str) -> Model:
        (model,) = (one.model for one in self.trainer.learners if one.stage == stage)
        return model

    @property
    def _retriever(self) -> Retriever:
        model = self._model("retrieval")
        assert isinstance(model, Retriever)
        return model


class GrowingEvents:
    """A source (`train.batcher.EventSource`) that is at its end until more events are added."""

    def __init__(self) -> None:
        self._added = EventsInMemory(EventBatch.empty())

    @property
    def offsets(self) -> LogOffsets:
        """Of a stream that is never resumed in the middle."""
        return self._added.offsets

    def add(self, events: EventBatch) -> None:
        """Hand out ``events`` next; the ones before must have been taken."""
        self._added = EventsInMemory(events)

    def next(self, max_events: int) -> EventBatch | None:
        """See `train.batcher.EventSource.next`."""
        return self._added.next(max_events)
