"""``marm train``: stream the log, accumulate the memory, publish models."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from app.build import start_memory
from app.cli.memory.settings import read_memory_args
from app.cli.options import (
    DEFAULT_HOME,
    AddressOption,
    HomeOption,
    MemoryFileOption,
    ShardsOption,
)
from app.cli.session import console, progress_bar, ray_session, to_json
from app.yaml_file import read_yaml
from cache_actors.event_log.log import EventLog
from cache_actors.home import Home
from marm.config import RECENCY, STAGES, ModelConfig
from marm.events import TASKS
from marm.memory import Namespace
from train.config import ERROR_LAYERS, TrainConfig, three_stages, with_errors
from train.progress import Progress
from train.run import TrainingResult, require_events, run_training


def train_command(
    home: HomeOption = DEFAULT_HOME,
    depth: Annotated[int, typer.Option(help="L: cached layers above layer 0.")] = 2,
    error_layers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of the L layers, the first so many hold accumulated prediction errors; 0: "
            "outputs of attention in all, as the paper has it. By default "
            f"{ERROR_LAYERS}, where rows can hold them.",
        ),
    ] = None,
    history: Annotated[int, typer.Option(help="n: rows visible to ranking.")] = 50,
    dim: Annotated[int, typer.Option(help="d: attention and feature width.")] = 32,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 2,
    tasks: Annotated[str, typer.Option(help="Comma-separated tasks to learn.")] = ",".join(TASKS),
    recency: Annotated[
        str, typer.Option(help="What biases attention: distance, gap or both.")
    ] = ",".join(RECENCY),
    sequence: Annotated[
        str, typer.Option(help="Events that become history: all, or a task such as long_view.")
    ] = "all",
    dtype: Annotated[str, typer.Option(help="Stored rows: float16, float32 or int8.")] = "float16",
    epoch: Annotated[int, typer.Option(help="Raise to start a fresh memory.")] = 0,
    stages: Annotated[str, typer.Option(help="Comma-separated models to train.")] = ",".join(
        STAGES
    ),
    batch_size: Annotated[int, typer.Option(help="Events per worker and step.")] = 256,
    workers: Annotated[int, typer.Option(min=1, help="Ray Train workers.")] = 1,
    device: Annotated[str, typer.Option(help="cpu (gloo) or cuda (NCCL).")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    seed: Annotated[int, typer.Option(help="Of parameter initialisation.")] = 0,
    run: Annotated[str, typer.Option(help="Runs of one name continue each other.")] = "main",
    variant: Annotated[str, typer.Option(help="Name to publish under.")] = "default",
    publish_every: Annotated[
        int, typer.Option(help="Steps between published versions; 0: at the end.")
    ] = 0,
    follow: Annotated[
        bool, typer.Option("--follow", help="Keep training as the log grows.")
    ] = False,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="YAML of all settings (TrainConfig), instead of the above."),
    ] = None,
    pool: Annotated[
        str | None, typer.Option("--pool", help="Name of the pool; default: as in --memory.")
    ] = None,
    memory_file: MemoryFileOption = None,
    shards: ShardsOption = None,
    address: AddressOption = None,
) -> None:
    """Train all stages in one pass over the log; prints the evaluation as JSON. The file that it
    names as metrics_file has the figures of every day too."""
    ranking = ModelConfig(
        namespace=Namespace(depth=depth, dim=dim, dtype=dtype, epoch=epoch, sequence=sequence),
        depth=depth,
        history_length=history,
        attention_dim=dim,
        feature_dim=dim,
        num_heads=heads,
        tasks=split_names(tasks),
        recency=split_names(recency),
    )
    wanted = split_names(stages)
    unknown = sorted(set(wanted) - set(STAGES))
    if unknown:
        raise ValueError(f"--stages must be some of {', '.join(STAGES)}, got {', '.join(unknown)}")
    config = TrainConfig(
        models=tuple(
            model
            for model in three_stages(with_errors(ranking, error_layers))
            if model.stage in wanted
        ),
        variant=variant,
        batch_size=batch_size,
        num_workers=workers,
        device=device,
        precision=precision,
        seed=seed,
        publish_every_steps=publish_every,
        follow=follow,
    )
    if config_file is not None:
        config = read_config(config_file)
    memory = read_memory_args(memory_file, pool=pool, shards=shards)
    target = Home(home)
    require_events(target, config)  # before anything is started or made
    target.create()
    with ray_session(address):
        start_memory(target, memory, memory.pool)
        result = train_with_progress(target, config, run, memory.pool)
    typer.echo(to_json(asdict(result)))


def read_config(path: Path) -> TrainConfig:
    """The settings in a YAML file, with the names of `TrainConfig` and `ModelConfig`."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping of training settings, got {values!r}")
    try:
        return TrainConfig.from_dict(values)
    except TypeError as error:
        raise ValueError(f"{path} has a setting of the wrong type: {error}") from error


def train_with_progress(
    home: Home, config: TrainConfig, run_name: str, pool: str = "default"
) -> TrainingResult:
    """Run training with a progress bar; Ctrl-C ends it, and the same run continues later."""
    total = EventLog(home.log).num_events()
    with progress_bar() as bars:
        task = bars.add_task("training", total=None if config.follow else total, note="starting")

        def show(progress: Progress) -> None:
            note = f"{progress.events_per_s:,.0f} events/s {headline(progress.window)}"
            bars.update(task, completed=progress.events_seen, note=note)

        result = run_training(home, config, run_name, show, pool)
        bars.update(task, completed=result.events_seen, note="done")
    console.print(
        f"trained to step {result.step:,}: published {result.versions}, "
        f"{result.events_per_s:,.0f} events/s"
    )
    return result


def headline(window: dict[str, dict[str, dict[str, float]]]) -> str:
    """The metric people look at first: GAUC of long view at ranking, over the latest window."""
    gauc = window.get("ranking", {}).get("long_view", {}).get("gauc")
    return "" if gauc is None else f"long-view GAUC {gauc:.4f}"


def split_names(text: str) -> tuple[str, ...]:
    """Names of a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
