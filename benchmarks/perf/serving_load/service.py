"""The service under measurement: a Ray, a Serve and the real application of its own."""

from __future__ import annotations

import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve

from app.args import AppArgs
from app.build import RAY_NAMESPACE, build_app
from benchmarks.perf.redis_server import free_port
from benchmarks.perf.serving_load.world import WorldSettings, fill_memory, make_world
from cache_actors.home import Home
from cache_actors.log_writer import stop_log_writer
from cache_actors.pool.client import MemoryClient
from cache_actors.pool.lifecycle import connect_pool, stop_pool
from cache_actors.pool.shard_link import PoolInfo

APPLICATION = "marm-perf"

_HOST = "127.0.0.1"
_RAY_CPUS = 16  # not what there is, but what replicas may reserve
_OBJECT_STORE_BYTES = 256 << 20
_READY_TIMEOUT_S = 120.0
_POLL_S = 0.1


@dataclass(frozen=True)
class ServiceSettings:
    """How the application runs. What is not here is as in the application's own defaults."""

    deadline_ms: int = 2_500
    cascading_replicas: int = 2  # it takes most of a request's time
    replica_cpus: float = 1.0
    model_poll_s: float = 1.0


@dataclass(frozen=True)
class RunningService:
    """A service that answers."""

    url: str
    home: Home
    pool: PoolInfo
    args: AppArgs

    def health(self) -> dict[str, Any] | None:
        """What /healthz says, also when it says no; None while nothing answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/healthz", timeout=5) as response:
                return dict(json.load(response))
        except urllib.error.HTTPError as error:
            with error, suppress(ValueError):
                return dict(json.load(error))
        except OSError:
            pass
        return None

    def await_ready(self) -> None:
        """Return once every stage serves and the whole memory answers."""
        deadline = time.monotonic() + _READY_TIMEOUT_S
        health = self.health()
        while health is None or health.get("status") != "ready":
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"the service is not ready after {_READY_TIMEOUT_S:.0f} s: {health}"
                )
            time.sleep(_POLL_S)
            health = self.health()


def app_args(
    home: Home, world: WorldSettings, settings: ServiceSettings, redis_url: str | None
) -> AppArgs:
    """The application's arguments, as serve_config.yaml has them."""
    # A stage may take all the time there is: budgets of stages are for what is not measured here.
    budget = {"timeout_ms": settings.deadline_ms, "budget_share": 0.9}
    variant = {"num_cpus": settings.replica_cpus, "poll_s": settings.model_poll_s}
    cascading = {**variant, "num_replicas": settings.cascading_replicas}
    return AppArgs.model_validate(
        {
            "home": str(home.path),
            "memory": {"shards": 2, "redis_url": redis_url},
            "retrieval": {**budget, "candidates": world.found, "variants": {"default": variant}},
            "cascading": {**budget, "candidates": world.kept, "variants": {"default": cascading}},
            "ranking": {**budget, "variants": {"default": variant}},
            "limits": {"deadline_ms": settings.deadline_ms},
        }
    )


@contextmanager
def running_service(
    home: Home, world: WorldSettings, settings: ServiceSettings, redis_url: str | None
) -> Iterator[RunningService]:
    """The application over a world of its own; everything that was started ends with the block."""
    make_world(home, world)
    ray.init(
        address="local",
        num_cpus=_RAY_CPUS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        object_store_memory=_OBJECT_STORE_BYTES,
    )
    try:
        port = free_port()
        serve.start(
            http_options={"host": _HOST, "port": port},
            logging_config={"enable_access_log": False},
        )
        args = app_args(home, world, settings, redis_url)
        serve.run(build_app(args), name=APPLICATION, route_prefix="/")
        pool = connect_pool(home, RAY_NAMESPACE)
        with MemoryClient(pool, world.namespace) as client:
            fill_memory(client, world)
        service = RunningService(f"http://{_HOST}:{port}", home, pool, args)
        service.await_ready()
        yield service
        # Not Serve's own end, which lets replicas drain for half a minute: nobody asks any more.
        stop_pool(pool)
        stop_log_writer(home, RAY_NAMESPACE)
    finally:
        ray.shutdown()
