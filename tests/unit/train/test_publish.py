"""What a published version says of itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sample_events import make_events, make_items, small_config

from cache_actors.event_log.catalog import append_items
from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.home import Home
from cache_actors.registry import ModelRegistry
from marm.memory import InProcessMemory
from train.collective import SingleWorker
from train.config import TrainConfig, three_stages
from train.metrics import EvaluationWindow
from train.publish import publish_versions
from train.stream import Hooks, StreamTrainer


def test_versions_say_how_far_they_have_learned(tmp_path: Path) -> None:
    home = Home(tmp_path).create()
    append_items(home.log, make_items(20))
    log, events = EventLog(home.log), make_events(24)
    log.append(events)
    config = TrainConfig(models=three_stages(small_config(), 3, 7), batch_size=8)
    trainer = StreamTrainer(
        config,
        InProcessMemory(config.namespace),
        log.reader(LogOffsets.start()),
        SingleWorker(),
        EvaluationWindow(1, 0),
    )

    def publish() -> None:
        publish_versions(trainer, home, trainer.offsets, trainer.feed_state.newest_ms)

    trainer.run(Hooks(lambda: None, publish, lambda: None))
    registry = ModelRegistry(home.models)
    for stage in ("ranking", "cascading", "retrieval"):
        published = registry.load(stage, "default", 1)
        assert published.newest_event_ms == int(np.max(events.timestamp_ms))
        assert LogOffsets.from_dict(published.config["log_offsets"]) == log.end()
        assert published.config["step"] == trainer.step
