"""`build_app`: from arguments to a Serve application. ``import_path: app.build:build_app``.

Without postponed annotations on purpose: Serve looks at the annotation of the builder's argument
to know that it is to be validated as `AppArgs`.
"""

import time
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from app.args import AppArgs, deployment_name
from app.ingress import Ingress
from app.memory_args import PoolSettings
from cache_actors.home import Home
from cache_actors.pool.lifecycle import start_pool, stored_config
from cache_actors.pool.shard_link import PoolInfo
from stages.deployments import StageSpec, stage_deployment
from stages.request import STAGES, StageName

RAY_NAMESPACE = "marm"
"""Where the actors live that outlive an application: memory shards and the log writer."""

RETRY_AFTER_S = 1.0
"""What Serve tells clients that it refuses itself, before they reach the edge."""


def build_app(args: AppArgs) -> Application:
    """Start the home's memory pool where it does not run, and wire stages and edge together.

    Serve calls this in a task of its own, possibly more than once; calling it again is safe.

    Raises:
        ValueError: when there is no home, naming the directory and what to run.
    """
    home = existing_home(args.home)
    pool = start_memory(home, args.memory, args.memory.pool)
    handles: dict[StageName, dict[str, Application]] = {
        stage: {
            name: bind_variant(args, stage, name, home, pool) for name in args.stage(stage).variants
        }
        for stage in STAGES
    }
    ingress = serve.deployment(
        name="ingress",
        user_config=args.ingress.user_config,
        backpressure_config={
            "status_code": args.load.admission.refusal_status,
            "retry_after_s": RETRY_AFTER_S,
        },
        **built_at(time.time(), args.ingress.deployment_options()),
    )(Ingress)
    return ingress.bind(args, home, pool, handles)


def bind_variant(
    args: AppArgs, stage: StageName, name: str, home: Home, pool: PoolInfo
) -> Application:
    """The bound deployment of one stage variant."""
    variant = args.stage(stage).variants[name]
    spec = variant_spec(args, stage, name, home, pool)
    deployment = stage_deployment(
        spec,
        name=deployment_name(stage, name),
        user_config=variant.user_config,
        options=built_at(time.time(), variant.deployment_options()),
    )
    return deployment.bind(spec)


def built_at(time_s: float, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a deployment; where its replicas follow the load, they differ from build to build.

    When an application is built again, Serve 2.60 forgets how its deployments scale, and learns it
    again only for those that changed; so none would follow the load any more after new arguments
    were refused and the old ones deployed again. What changes here has no effect: it is the wait
    before the last replica goes, which with ``min_replicas`` of at least 1 never does.
    """
    scaling = options.get("autoscaling_config")
    if scaling is None:
        return options
    return {**options, "autoscaling_config": {**scaling, "downscale_to_zero_delay_s": time_s}}


def variant_spec(
    args: AppArgs, stage: StageName, name: str, home: Home, pool: PoolInfo
) -> StageSpec:
    """What a replica of a stage variant is told."""
    variant = args.stage(stage).variants[name]
    return StageSpec(
        stage=stage,
        variant=name,
        model=variant.model or name,
        home=home,
        pool=pool,
        index=variant.index,
        num_cpus=variant.num_cpus,
        poll_s=variant.poll_s,
        staleness=args.memory.staleness.bound(),
        plan=variant.scoring_plan(),
    )


def start_memory(home: Home, settings: PoolSettings, name: str) -> PoolInfo:
    """The running pool, started where it is not: with ``settings`` where they are given, and else
    as it was last started.

    Raises:
        PoolConfigError: it runs otherwise, or what is asked for can't be changed.
    """
    config = settings.over(stored_config(home, RAY_NAMESPACE, name))
    return start_pool(home, settings.shards, RAY_NAMESPACE, name, config=config)


def existing_home(path: str) -> Home:
    """The home at ``path``, which training or ingestion made before."""
    home = Home(Path(path))
    for directory, what in ((home.path, "home"), (home.models, "model directory")):
        if not directory.is_dir():
            raise ValueError(
                f"there is no {what} at {directory}; run `marm demo` or `marm train` first, or set "
                "'home' in the args of serve_config.yaml to the directory they used (relative "
                "paths start where `serve run` was started)"
            )
    return home
