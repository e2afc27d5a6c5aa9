"""Algorithm 1 over a stream: predict, save, learn, one micro-batch after the other.

While a batch is learned, the next one is read, its rows are fetched and its inputs are built in
another thread. Saves are asynchronous. Neither changes any result: rows not yet acknowledged are
laid over what was fetched (see `train.overlay`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cache_actors.event_log.offsets import LogOffsets
from cache_actors.store.row_formats import as_read
from marm.events import EventBatch
from marm.inputs import ModelInputs
from marm.memory import Memory, UserRows
from marm.retriever import Retriever
from marm.sequence import enters_sequence, raw_rows
from train.batcher import Batcher, EventSource, FeedState, MicroBatch
from train.collective import Collective
from train.config import TrainConfig
from train.learner import Learner
from train.lost_rows import LostRows, fetch_without
from train.metrics import EvaluationWindow, StreamingMetrics
from train.overlay import Overlay, PendingSave
from train.retrieval_metrics import RetrievalMetrics
from train.screening import EventScreen


@dataclass(frozen=True)
class Prepared:
    """A micro-batch with everything that does not depend on weights."""

    events: EventBatch
    rows: UserRows
    inputs: list[ModelInputs]  # one per learner
    resume: LogOffsets | None
    state: FeedState | None  # of the feed, where ``resume`` is


@dataclass(frozen=True)
class Hooks:
    """What the surroundings of a run do at certain moments; called on every worker, in step."""

    checkpoint: Callable[[], None]
    publish: Callable[[], None]
    progress: Callable[[], None]

    @staticmethod
    def nothing() -> Hooks:
        """Of a run with no surroundings: nothing is checkpointed, published or shown."""
        return Hooks(*[lambda: None] * 3)


class StreamTrainer:
    """One worker's share of a run: its learners, its part of the log, the memory."""

    def __init__(
        self,
        config: TrainConfig,
        memory: Memory,
        source: EventSource,
        collective: Collective,
        evaluated: EvaluationWindow,
    ) -> None:
        self.config, self.collective = config, collective
        self.learners = [Learner(model, config, collective) for model in config.models]
        tasks = {learner.stage: learner.model.tasks for learner in self.learners}
        self.metrics = StreamingMetrics(tasks, evaluated)
        self.retrieval_metrics = _retrieval_metrics(self.learners, evaluated, collective)
        self.step = 0
        self.events_seen = 0
        self.offsets = source.offsets
        self._source = source
        self._memory = memory
        self._batcher = Batcher(source, config.batch_size, EventScreen(config.max_ahead_s))
        self.feed_state = self._batcher.state()
        self._overlay = Overlay()
        self.started_s = int(time.time())  # of the run, however often it was continued
        self._last_checkpoint_step = self.published_step = 0
        self._last_publish_s = time.monotonic()

    def run(self, hooks: Hooks) -> None:
        """Train to the end of the log, or on and on when following; every row is acknowledged and
        the last version published when this returns. A last checkpoint is left to the caller."""
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as executor:
            prepared = executor.submit(self._prepare, self.step)
            idle_since = time.monotonic()
            while True:
                batch = prepared.result()
                header = self._exchange_header(batch, idle_since)
                if header.num_events:
                    prepared = self._train_step(batch, header, executor)
                    self._after_step(header, hooks)
                    idle_since = time.monotonic()  # a slow step is no idle time
                    continue
                self._note_place(batch)
                if header.is_publish_due and self.step > self.published_step:
                    self._publish(hooks)
                    self._checkpoint(hooks)
                if header.is_over:
                    break
                time.sleep(self.config.follow_poll_s)
                prepared = executor.submit(self._prepare, self.step)
        self.flush()
        if self.step > self.published_step:
            self._publish(hooks)

    def flush(self) -> None:
        """Wait until every computed row is acknowledged by the memory."""
        self._overlay.flush()

    def restore(
        self,
        step: int,
        events_seen: int,
        published_step: int,
        feed_state: FeedState,
        started_s: int,
    ) -> None:
        """Continue counting from a checkpoint; learners and metrics are loaded by the caller."""
        self.started_s = min(self.started_s, started_s)
        self._batcher.restore(feed_state)
        self.feed_state = feed_state
        self.step = self._last_checkpoint_step = step
        self.events_seen, self.published_step = events_seen, published_step

    def _prepare(self, step: int) -> Prepared:
        """The next batch, to be learned in ``step``."""
        micro_batch = self._batcher.next()
        if micro_batch is None:
            # Whatever was handed out is learned by the time this empty batch is.
            micro_batch = MicroBatch(
                EventBatch.empty(), self._source.offsets, self._batcher.state()
            )
        events = micro_batch.events
        if self.config.writes_memory:
            rows = self._fetch_history(events, step)
            inputs = [learner.model.inputs.for_training(events, rows) for learner in self.learners]
        else:
            rows = self._fetch_through(events)
            inputs = [learner.model.inputs.for_reading(events, rows) for learner in self.learners]
        return Prepared(events, rows, inputs, micro_batch.resume, micro_batch.state)

    def _fetch_history(self, events: EventBatch, step: int) -> UserRows:
        """Rows from before each user's first event of the batch."""
        users, before_ms = _per_user(events, np.minimum, np.iinfo(np.int64).max)
        self._overlay.settle()
        lost, n = LostRows(self.started_s, step), self.config.history_length
        fetched = fetch_without(lost, self._memory, users, n, before_ms)
        return self._overlay.merge(fetched, n, before_ms)

    def _fetch_through(self, events: EventBatch) -> UserRows:
        """Rows from before each user's last event of the batch, enough for all of them."""
        users, before_ms = _per_user(events, np.maximum, 0)
        most = int(np.unique(events.user_id, return_counts=True)[1].max(initial=0))
        return self._memory.fetch(users, self.config.history_length + most, before_ms)

    def _train_step(
        self, batch: Prepared, header: _Header, executor: ThreadPoolExecutor
    ) -> Future[Prepared]:
        labels = batch.events.labels
        memory_BLD = None
        for learner, inputs in zip(self.learners, batch.inputs, strict=True):
            output = learner.predict(inputs, labels, memory_BLD)
            self.metrics.add(learner.stage, batch.events, output.scores_BT, self.step)
            if learner.stage == self.config.writer:
                memory_BLD = output.rows_BLD
                self._save(batch.events, memory_BLD)
            if learner.stage == "retrieval" and self.retrieval_metrics is not None:
                self.retrieval_metrics.observe(batch.events, batch.rows, output, self.step)
        # From here on the next batch sees this one's rows, so it can be prepared meanwhile.
        following = executor.submit(self._prepare, self.step + 1)
        for learner, num_labels in zip(self.learners, header.num_labels, strict=True):
            learner.learn(labels, num_labels)
        self.step += 1
        self.events_seen += header.num_events
        self._note_place(batch)
        return following

    def _note_place(self, batch: Prepared) -> None:
        """Where a run would continue after ``batch``."""
        if batch.resume is not None and batch.state is not None:
            self.offsets, self.feed_state = batch.resume, batch.state

    def _save(self, events: EventBatch, memory_BLD: torch.Tensor) -> None:
        """``MARMCacheSave`` (Eq. 8) of the events that enter the sequence."""
        keep = enters_sequence(events, self._memory.namespace.sequence)
        if not keep.any():
            return
        rows = raw_rows(events, self._memory.namespace.row_dtype)
        rows["memory"] = memory_BLD.float().cpu().numpy()
        rows["written_step"] = self.step
        rows["written_s"] = int(time.time())
        # As they will be read: results must not depend on when a save is acknowledged.
        owners, rows = events.user_id[keep], as_read(self._memory.namespace, rows[keep])
        self._overlay.add(PendingSave(owners, rows, self._memory.save(owners, rows)))

    def _exchange_header(self, batch: Prepared, idle_since: float) -> _Header:
        """What all workers must agree on before a step, in one exchange."""
        now = time.monotonic()
        is_first = self.collective.rank == 0
        timeout = self.config.idle_timeout_s
        timed_out = timeout is not None and now - idle_since > timeout
        since_publish_s = now - self._last_publish_s
        publish_due = since_publish_s > self.config.caught_up_interval_s or timed_out
        interval_over = self.config.follow and since_publish_s > self.config.publish_interval_s
        values = [
            len(batch.events),
            batch.resume is None,
            is_first and publish_due,
            is_first and (timed_out or not self.config.follow),
            is_first and interval_over,
            *(learner.model.num_labels(batch.events.labels) for learner in self.learners),
        ]
        total = self.collective.sum(torch.tensor(values, dtype=torch.int64)).tolist()
        flags = [count > 0 for count in total[1:5]]
        return _Header(total[0], not flags[0], flags[1], flags[2], flags[3], total[5:])

    def _after_step(self, header: _Header, hooks: Hooks) -> None:
        hooks.progress()
        every = self.config.publish_every_steps
        is_step_due = every > 0 and self.step - self.published_step >= every
        if is_step_due or header.is_interval_over:
            self._publish(hooks)
        is_due = self.step - self._last_checkpoint_step >= self.config.checkpoint_every_steps
        if is_due and header.is_resumable:
            self._checkpoint(hooks)

    def _publish(self, hooks: Hooks) -> None:
        self.flush()
        hooks.publish()
        self.published_step, self._last_publish_s = self.step, time.monotonic()

    def _checkpoint(self, hooks: Hooks) -> None:
        # A checkpoint implies that every row before its offsets is acknowledged.
        self.flush()
        self.metrics.days.close_idle(self.collective)
        if self.retrieval_metrics is not None:
            self.retrieval_metrics.forget_vectors()
        hooks.checkpoint()
        self._last_checkpoint_step = self.step


@dataclass(frozen=True)
class _Header:
    num_events: int
    is_resumable: bool  # no worker is inside a split read
    is_publish_due: bool  # if there is nothing to learn just now
    is_over: bool
    is_interval_over: bool  # publish although there is more to learn
    num_labels: list[int]


def _retrieval_metrics(
    learners: list[Learner], evaluated: EvaluationWindow, collective: Collective
) -> RetrievalMetrics | None:
    """None when there is nothing to evaluate."""
    for learner in learners:
        if isinstance(learner.model, Retriever) and not evaluated.is_empty:
            return RetrievalMetrics(learner.model, evaluated, collective)
    return None


def _per_user(
    events: EventBatch, ufunc: np.ufunc, start: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Distinct users and ``ufunc`` over the timestamps of each."""
    users, position = np.unique(events.user_id, return_inverse=True)
    stamps = np.full(len(users), start, np.int64)
    ufunc.at(stamps, position, events.timestamp_ms)
    return users, stamps
