"""The Serve deployments around the stages: one per stage variant. Nothing here is worth a unit
test; what a stage does is in `stages.server` and below."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import faiss
import torch
from ray import serve
from ray.serve import Deployment

from cache_actors.home import Home
from cache_actors.pool.shard_link import PoolInfo
from cache_actors.pool.staleness import UNBOUNDED, StalenessBound
from cache_actors.registry import ModelRegistry, PublishedModel
from stages.assemble import OpenMemory, build_cascading, build_ranking, build_retrieval
from stages.knobs import CascadingKnobs, RankingKnobs, RetrievalKnobs, StageKnobs
from stages.live_model import LiveModel
from stages.pool_memory import PoolMemory
from stages.request import StageName, StageRequest, StageResult, StageStatus
from stages.server import StageServer

EXTRA_THREADS = 4
"""Requests of a replica that may wait for memory while others compute."""


@dataclass(frozen=True)
class StageSpec:
    """What a replica of a stage variant needs to know."""

    stage: StageName
    variant: str
    model: str  # the published variant it serves
    home: Home
    pool: PoolInfo
    index: str
    num_cpus: float
    poll_s: float
    staleness: StalenessBound = UNBOUNDED

    @property
    def num_threads(self) -> int:
        """Threads of torch and of the item index."""
        return max(1, math.floor(self.num_cpus))


class StageReplica:
    """One replica of one stage variant."""

    def __init__(self, spec: StageSpec) -> None:
        torch.set_num_threads(spec.num_threads)
        faiss.omp_set_num_threads(spec.num_threads)
        self._server = make_server(spec)
        self._threads = ThreadPoolExecutor(spec.num_threads + EXTRA_THREADS, spec.stage)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take new live settings; a version they name is loaded in the background."""
        self._server.reconfigure(user_config)

    async def run(self, request: StageRequest) -> StageResult:
        """Answer one request, off the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._server.run, request)

    async def status(self) -> StageStatus:
        """Whether this variant can serve, and with what."""
        return self._server.status()


def make_server(spec: StageSpec) -> StageServer:
    """The server of a stage variant, following the home's registry."""
    registry = ModelRegistry(spec.home.models)
    open_memory = PoolMemory(spec.pool, spec.staleness).client
    build, knobs = stage_parts(spec, open_memory)
    live: LiveModel[Any] = LiveModel(
        registry, spec.stage, spec.model, build, logging.getLogger("ray.serve")
    )
    live.poll()
    live.start(spec.poll_s)
    return StageServer(spec.stage, spec.variant, live, knobs)


def stage_parts(
    spec: StageSpec, open_memory: OpenMemory
) -> tuple[Callable[[PublishedModel], Any], type[StageKnobs]]:
    """How a stage is built from a published version, and the settings it takes."""
    if spec.stage == "retrieval":
        build = partial(build_retrieval, open_memory=open_memory, index_kind=spec.index)
        return build, RetrievalKnobs
    if spec.stage == "cascading":
        return partial(build_cascading, open_memory=open_memory), CascadingKnobs
    return partial(build_ranking, open_memory=open_memory), RankingKnobs


def stage_deployment(
    spec: StageSpec,
    name: str,
    num_replicas: int,
    max_ongoing_requests: int,
    max_queued_requests: int,
    user_config: dict[str, Any],
) -> Deployment:
    """The deployment of a stage variant, to be bound to its spec."""
    return serve.deployment(
        name=name,
        num_replicas=num_replicas,
        max_ongoing_requests=max_ongoing_requests,
        max_queued_requests=max_queued_requests,
        ray_actor_options={"num_cpus": spec.num_cpus},
        user_config=user_config,
    )(StageReplica)
