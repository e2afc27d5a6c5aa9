"""`marm train --follow` in a process of its own, and how far the log is learned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.perf.freshness_run.waits import LogPlace
from benchmarks.perf.serving_load.world import VARIANT, WorldSettings
from cache_actors.event_log.log import EventLog
from cache_actors.event_log.offsets import LogOffsets
from cache_actors.home import Home
from marm.addressing import user_bucket
from train.config import TrainConfig

_EXIT_TIMEOUT_S = 30.0
_TOLD_BYTES = 2_000


@dataclass(frozen=True)
class FollowSettings:
    """How the follower trains; see `train.config.TrainConfig`."""

    batch_size: int = 256
    publish_interval_s: float = 60.0
    caught_up_interval_s: float = 5.0
    follow_poll_s: float = 0.2

    def config(self, world: WorldSettings) -> TrainConfig:
        """Trains the models that the service began with."""
        return TrainConfig(
            models=(
                world.model_config("ranking"),
                world.model_config("cascading"),
                world.model_config("retrieval"),
            ),
            variant=VARIANT,
            batch_size=self.batch_size,
            publish_interval_s=self.publish_interval_s,
            caught_up_interval_s=self.caught_up_interval_s,
            follow_poll_s=self.follow_poll_s,
            follow=True,
        )


@dataclass(frozen=True)
class Follower:
    """A training that follows the log."""

    process: subprocess.Popen[bytes]
    output: Path

    def require_running(self) -> None:
        """Raise RuntimeError with the last it said when it has ended."""
        code = self.process.poll()
        if code is not None:
            told = self.output.read_bytes()[-_TOLD_BYTES:].decode(errors="replace")
            raise RuntimeError(f"`marm train --follow` ended with exit code {code}:\n{told}")


@contextmanager
def following(
    home: Home, config: TrainConfig, ray_address: str, directory: Path
) -> Iterator[Follower]:
    """A follower on the Ray cluster of ``ray_address``; it ends with the block."""
    settings, output = directory / "train.yaml", directory / "train.log"
    settings.write_text(json.dumps(config.to_dict()), encoding="utf-8")  # JSON is YAML, too
    with output.open("wb") as file:
        process = _start(home, settings, ray_address, file)
        try:
            yield Follower(process, output)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_EXIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _start(
    home: Home, settings: Path, ray_address: str, output: IO[bytes]
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from app.cli.main import cli; cli()", "train"]
    options = ["--home", str(home.path), "--config", str(settings), "--address", ray_address]
    return subprocess.Popen(
        [*command, *options],
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
    )


def places_in_log(log: EventLog) -> dict[int, LogPlace]:
    """Where every event of ``log`` lies, by event key."""
    reader = log.reader(LogOffsets.start())
    places = {}
    while (event := reader.next(1)) is not None:
        bucket = int(user_bucket(event.user_id)[0])
        segment, rows = reader.offsets.positions[bucket].tolist()
        places[int(event.event_key[0])] = LogPlace(bucket, segment, rows)
    return places
