"""The evaluation of a run: retrieval ranks as a server would, and resuming changes no figure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sample_events import make_events, small_config, small_model

from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from marm.events import TASKS
from marm.items import ItemFeatures
from marm.memory import InProcessMemory
from marm.retriever import Retriever
from marm.sequence import raw_rows
from train import daily
from train.checkpoint import checkpoint_offsets, load_checkpoint, save_checkpoint
from train.collective import SingleWorker
from train.config import TrainConfig, three_stages
from train.evaluation import evaluate
from train.metrics import EvaluationWindow
from train.retrieval_metrics import CUTOFFS, METHODS, RetrievalMetrics
from train.stream import Hooks, StreamTrainer

EVERYTHING = EvaluationWindow(0, 1 << 62)
DAY_MS = 86_400_000


@pytest.mark.parametrize("num_user_vectors", [1, 3])
def test_the_true_item_is_ranked_as_a_server_would(num_user_vectors: int) -> None:
    model = small_model("retrieval", num_user_vectors=num_user_vectors)
    assert isinstance(model, Retriever)
    events = make_events(120)
    namespace = model.config.namespace
    memory = InProcessMemory(namespace)
    memory.save(events.user_id, raw_rows(events, namespace.row_dtype))
    metrics = RetrievalMetrics(model, EVERYTHING, SingleWorker())
    for step, part in enumerate((slice(0, 60), slice(60, 120))):
        batch = events.take(part)
        rows = memory.fetch(np.unique(batch.user_id), 1000)
        embedded = model.embed(model.inputs.for_reading(batch, rows))
        output = model.training_forward(model.net, embedded, batch.labels)
        if step == 1:
            # Only what the first batch showed is known; whoever was ranked in it is left out here.
            metrics.sample.__init__(1000, len(METHODS))  # type: ignore[misc]
        metrics.observe(batch, rows, output, step)

    known = {item: index for index, item in enumerate(events.item_id[:60].tolist())}
    catalog = ItemFeatures(
        *(
            getattr(events, name)[list(known.values())]
            for name in ("item_id", "author_id", "tag_id", "duration_ms")
        )
    )
    expected = []
    for index in np.flatnonzero(batch.labels[:, TASKS.index("long_view")] > 0):
        user, now_ms = int(batch.user_id[index]), int(batch.timestamp_ms[index])
        past = memory.fetch(np.array([user]), 10, np.array([now_ms]))
        vectors = model.user_vectors(past, user, now_ms, int(batch.context_id[index]))
        own = ItemFeatures(
            *(
                getattr(batch, name)[index : index + 1]
                for name in ("item_id", "author_id", "tag_id", "duration_ms")
            )
        )
        true = (model.item_vectors(own) @ vectors.T).max()
        hidden = {*past.rows["item_id"].tolist(), int(own.item_id[0])}
        rivals = ~np.isin(catalog.item_id, list(hidden))
        scores = (model.item_vectors(catalog) @ vectors.T).max(axis=1)[rivals]
        expected.append((1 + int((scores > true).sum()), int(rivals.sum()) + 1))
    sample = metrics.sample
    found = zip(sample.ranks_BS[:, 0].astype(int), sample.candidates.tolist(), strict=True)
    assert sorted(found) == sorted(expected)
    assert len(expected) > 10


def make_log(path: Path) -> EventLog:
    """Several days of events."""
    log = EventLog(path)
    events = make_events(320, num_users=12)
    log.append(replace(events, timestamp_ms=events.timestamp_ms + np.arange(320) * DAY_MS // 40))
    return log


def config() -> TrainConfig:
    return TrainConfig(
        models=three_stages(small_config(history_length=8)),
        batch_size=32,
        checkpoint_every_steps=3,
    )


class CrashError(Exception):
    """The run is over before its time."""


def test_a_resumed_run_ends_with_the_same_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daily, "OPEN_DAYS", 2)
    log, settings, saved = make_log(tmp_path / "log"), config(), list[Path]()

    def trainer_from(offsets: LogOffsets, memory: InProcessMemory) -> StreamTrainer:
        return StreamTrainer(settings, memory, log.reader(offsets), SingleWorker(), EVERYTHING)

    def nothing() -> None:
        pass

    namespace = settings.namespace
    unbroken = trainer_from(LogOffsets.start(), InProcessMemory(namespace))
    unbroken.run(Hooks(nothing, nothing, nothing))
    memory = InProcessMemory(namespace)
    first = trainer_from(LogOffsets.start(), memory)

    def checkpoint() -> None:
        saved.append(tmp_path / f"checkpoint-{first.step}")
        saved[-1].mkdir()
        save_checkpoint(first, saved[-1], first.offsets)

    def crash() -> None:
        if first.step == 8:
            raise CrashError

    with pytest.raises(CrashError):
        first.run(Hooks(checkpoint, nothing, crash))
    second = trainer_from(checkpoint_offsets(saved[-1], settings), memory)
    load_checkpoint(second, saved[-1])
    assert second.metrics.days.rows  # some days were closed before the crash
    second.run(Hooks(nothing, nothing, nothing))

    evaluation = evaluate(unbroken)
    assert repr(evaluate(second)) == repr(evaluation)
    alone = SingleWorker()
    table = unbroken.metrics.days.table(alone)
    assert repr(second.metrics.days.table(alone)) == repr(table)
    assert len(table) == 9
    assert {stage for row in table.values() for stage in row["stages"]} == {
        "ranking",
        "cascading",
        "retrieval",
    }
    total = evaluation["ranking"]["long_view"]["events"]
    by_day = [row["stages"]["ranking"]["long_view"]["events"] for row in table.values()]
    assert sum(by_day) == total

    retrieval, cascading = (evaluation[of]["long_view"] for of in ("retrieval", "cascading"))
    for method in ("", "popularity_", "item_to_item_"):
        recalls = [retrieval[f"{method}recall@{k}"] for k in CUTOFFS]
        assert recalls == sorted(recalls)
        assert recalls[-1] == 1.0  # there are fewer items
        assert 0 < retrieval[f"{method}ndcg@{CUTOFFS[0]}"] < recalls[0]
    assert 0 <= cascading["pairs_alike"] <= 1
    assert 0 <= cascading["top_5_recall"] <= 1


def test_without_an_evaluated_part_nothing_is_ranked(tmp_path: Path) -> None:
    log, settings = make_log(tmp_path / "log"), config()
    nobody = EvaluationWindow(1, 0)
    memory = InProcessMemory(settings.namespace)
    trainer = StreamTrainer(
        settings, memory, log.reader(LogOffsets.start()), SingleWorker(), nobody
    )
    assert trainer.retrieval_metrics is None
    assert evaluate(trainer) == {}
