"""``marm demo``: the whole system once, on simulated users."""

from __future__ import annotations

import shutil
import socket
from typing import Annotated, Any

import typer
from ray import serve

from app.args import AppArgs
from app.build import build_app, start_memory
from app.cli.memory.settings import read_memory_args
from app.cli.options import DEFAULT_HOME, HomeOption, MemoryFileOption, ShardsOption
from app.cli.session import console, ray_session, to_json
from app.cli.train import train_with_progress
from app.cli.world import simulate
from app.demo import ServingReport, try_serving
from app.memory_args import MemoryArgs
from cache_actors.event_log.log import EventLog
from cache_actors.home import Home
from cache_actors.pool.client import MemoryClient
from cache_actors.pool.lifecycle import stop_pool
from marm.config import ModelConfig
from train.config import TrainConfig, three_stages, with_errors
from train.data.world_config import WorldConfig
from train.floor import item_mean_floor
from train.run import TrainingResult, evaluation_window

_DEMO_TASK = "long_view"
_APP = "marm"


def demo(
    home: HomeOption = DEFAULT_HOME,
    users: Annotated[int, typer.Option(help="Simulated users.")] = 1_500,
    events: Annotated[int, typer.Option(help="Simulated exposures.")] = 150_000,
    port: Annotated[int, typer.Option(help="HTTP port; 0 takes a free one.")] = 0,
    memory_file: MemoryFileOption = None,
    shards: ShardsOption = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete what an earlier demo left in this home.")
    ] = False,
) -> None:
    """Simulate, train all three stages, serve them, give feedback; ends with one JSON line.

    What it leaves in the home can be served with `serve run serve_config.yaml`.
    """
    settings = read_memory_args(memory_file, shards=shards)
    target = Home(home)
    if fresh:
        clear_demo(target)
    check_unused(target)
    target.create()
    world = WorldConfig(num_users=users, num_events=events)
    (target.path / _MARKER).touch()
    console.print("[bold]1. stream[/]: simulated users write the event log")
    simulate(target, world)
    with ray_session("local"):
        console.print("[bold]2. train[/]: Algorithm 1 fills the memory; three models are published")
        pool = start_memory(target, settings, settings.pool)
        config = TrainConfig(
            models=three_stages(with_errors(ModelConfig())),
            batch_size=128,  # a short log: more steps, with a smaller step in the tables
            sparse_learning_rate=0.05,
        )
        training = train_with_progress(target, config, "main", settings.pool)
        with MemoryClient(pool, config.namespace) as memory:
            held = [shard.held for shard in memory.stats().shards]
        console.print(
            "[bold]3. serve[/]: retrieval, cascading and ranking over HTTP, then feedback"
        )
        report = serve_and_ask(target, port, settings)
        stop_pool(pool)
    log = EventLog(target.log)
    window = evaluation_window(log, events, config.evaluation_fraction)
    floor = item_mean_floor(log, _DEMO_TASK, window.from_ms)
    rows = sum(part.rows for part in held if part is not None)
    typer.echo(to_json(demo_summary(training, report, floor["gauc"], rows)))


_MARKER = ".marm-demo"


def check_unused(home: Home) -> None:
    """Refuse a home that holds anything but a demo that wrote no events yet."""
    if EventLog(home.log).num_events():
        raise ValueError(
            f"the log in {home.log} holds events already; choose another --home, or pass --fresh "
            "to delete an earlier demo"
        )
    # What a demo marks as its own, --fresh may delete later.
    if home.path.is_dir() and any(home.path.iterdir()) and not (home.path / _MARKER).exists():
        raise ValueError(f"{home.path} is not empty; choose a new directory as --home of a demo")


def clear_demo(home: Home) -> None:
    """Delete a home that a demo made; any other is left alone."""
    if not home.path.exists():
        return
    if not (home.path / _MARKER).exists():
        raise ValueError(
            f"{home.path} was not made by a demo, so --fresh does not delete it; choose another "
            "--home"
        )
    shutil.rmtree(home.path)


def serve_and_ask(home: Home, port: int, memory: MemoryArgs) -> ServingReport:
    """Start the application as ``serve run`` would, use it over HTTP, and stop it."""
    port = port or free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        args = AppArgs(home=str(home.path), memory=memory)
        with console.status("starting the application"):
            serve.run(build_app(args), name=_APP, route_prefix="/")
        return try_serving(f"http://127.0.0.1:{port}", user_ids=list(range(1, 21)))
    finally:
        serve.shutdown()


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def demo_summary(
    training: TrainingResult, report: ServingReport, floor_gauc: float, memory_rows: int
) -> dict[str, Any]:
    """The demo's last line."""
    gauc = {
        stage: {
            task: round(metrics["gauc"], 4) for task, metrics in tasks.items() if "gauc" in metrics
        }
        for stage, tasks in training.evaluation.items()
    }
    return {
        "gauc": gauc,
        "floor_gauc": round(floor_gauc, 4),
        "memory_rows": memory_rows,
        "hit_rate": round(training.hit_rate, 4),
        "stage_ms": report.stage_ms,
        "memory_depth": report.memory_depth,
        "events_per_s": round(training.events_per_s),
        "feedback_changed_next_answer": report.feedback_changed_next_answer,
    }
