"""What a trainer keeps of the stream is what it says, and nothing behind it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sample_events import make_events, small_config

from benchmarks.perf.trainer_memory import EndlessItems, MemoryLog, Settings, measure
from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from marm.memory import InProcessMemory
from train.collective import SingleWorker
from train.config import TrainConfig, three_stages
from train.metrics import EvaluationWindow
from train.stream import Hooks, StreamTrainer


def held_bytes(array: np.ndarray) -> int:
    """Memory that stays in use as long as ``array`` does."""
    base: object = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    if isinstance(base, torch.Tensor):
        return base.untyped_storage().nbytes()
    assert isinstance(base, np.ndarray)
    return base.nbytes


def test_a_kept_score_keeps_nothing_else(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append(make_events(64))
    config = TrainConfig(models=three_stages(small_config()), batch_size=32)
    memory = InProcessMemory(config.namespace)
    reader = log.reader(LogOffsets.start())
    trainer = StreamTrainer(config, memory, reader, SingleWorker(), EvaluationWindow(0, 1 << 62))
    trainer.run(Hooks(lambda: None, lambda: None, lambda: None))
    for stage, predictions in trainer.metrics.evaluation.items():
        assert predictions.scores
        for scores in predictions.scores:
            assert held_bytes(scores) == scores.nbytes, stage


def test_the_endless_stream_goes_on_with_new_items() -> None:
    source = EndlessItems(Settings(events=500, users=9))
    parts = []
    while (part := source.next(200)) is not None:
        parts.append(part)
    assert [len(part) for part in parts] == [200, 200, 100]
    items = np.concatenate([part.item_id for part in parts])
    stamps = np.concatenate([part.timestamp_ms for part in parts])
    assert (np.diff(stamps) > 0).all()
    assert len(np.unique(items[items >= 2000])) == int((items >= 2000).sum())
    assert 150 < int((items >= 2000).sum()) < 350


def test_the_slope_is_of_the_second_half() -> None:
    log = MemoryLog(every=1, metrics_window=1)
    assert log.growth_mib_per_million() is None
    log.events = [1_000_000, 2_000_000, 3_000_000, 4_000_000]
    log.rss_mib = [100.0, 500.0, 600.0, 602.0]
    assert log.growth_mib_per_million() == pytest.approx(2.0)


def test_the_program_measures(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(
        events=96, every=32, users=5, history=4, dim=4, slots=64, batch_size=32, table="hashed"
    )
    found = measure(settings)
    assert found["events"] == [32, 64, 96]
    assert len(capsys.readouterr().out.splitlines()) == 3
