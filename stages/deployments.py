"""The Serve deployments around the stages: one per stage variant. Nothing here is worth a unit
test; what a stage does is in `stages.server` and below."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
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
from marm.scoring_plan import ScoringPlan
from stages.assemble import EXACT, OpenMemory, build_cascading, build_ranking, build_retrieval
from stages.executor import StageThreads
from stages.freed_memory import keep_freed_memory
from stages.grouped_calls import answer_together
from stages.index_args import IndexArgs
from stages.knobs import CascadingKnobs, RankingKnobs, RetrievalKnobs, StageKnobs
from stages.live_model import LiveModel
from stages.live_notes import LiveNotes
from stages.pool_memory import PoolMemory
from stages.request import StageName, StageRequest, StageResult, StageStatus
from stages.server import StageServer
from stages.swap_check import KeepsRows
from stages.turns import Turns

EXTRA_THREADS = 8
"""Requests of a replica that may wait, for memory or for their turn, while another computes."""


@dataclass(frozen=True)
class StageSpec:
    """What a replica of a stage variant needs to know."""

    stage: StageName
    variant: str
    model: str  # the published variant it serves
    home: Home
    pool: PoolInfo
    index: IndexArgs
    num_cpus: float
    poll_s: float
    staleness: StalenessBound = UNBOUNDED
    plan: ScoringPlan = EXACT

    @property
    def num_threads(self) -> int:
        """Threads of torch and of the item index."""
        return max(1, math.floor(self.num_cpus))


class StageReplica:
    """One replica of one stage variant."""

    def __init__(self, spec: StageSpec) -> None:
        keep_freed_memory()
        torch.set_num_threads(spec.num_threads)
        faiss.omp_set_num_threads(spec.num_threads)
        self._server = make_server(spec)
        self._threads = StageThreads(spec.num_threads + EXTRA_THREADS, spec.stage)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take new live settings; a version they name is loaded in the background."""
        self._server.reconfigure(user_config)

    async def run(self, requests: tuple[StageRequest, ...]) -> list[StageResult | None]:
        """Answer the requests of a call, off the event loop; one that fails fails alone.

        When the call is cancelled, those of its requests that still wait are dropped.
        """
        return await answer_together(self._answer, requests)

    async def _answer(self, request: StageRequest) -> StageResult:
        return await self._threads.run(self._server.answer, request)

    async def status(self) -> StageStatus:
        """Whether this variant can serve, and with what."""
        return self._server.status()


def make_server(spec: StageSpec) -> StageServer:
    """The server of a stage variant, following the home's registry."""
    registry = ModelRegistry(spec.home.models)
    memory = PoolMemory(spec.pool, spec.staleness)
    build, knobs = stage_parts(spec, memory.client)
    live: LiveModel[Any] = LiveModel(
        registry,
        spec.stage,
        spec.model,
        build,
        logging.getLogger("ray.serve"),
        KeepsRows(memory.rows_held),
        LiveNotes(registry, spec.stage, spec.model, spec.variant),
    )
    live.poll()
    live.start(spec.poll_s)
    return StageServer(spec.stage, spec.variant, live, knobs)


def stage_parts(
    spec: StageSpec, open_memory: OpenMemory
) -> tuple[Callable[[PublishedModel], Any], type[StageKnobs]]:
    """How a stage is built from a published version, and the settings it takes."""
    turns = Turns()  # the replica's: a version and its successor compute in turn, too
    if spec.stage == "retrieval":
        build = partial(
            build_retrieval,
            open_memory=open_memory,
            index=spec.index,
            num_threads=spec.num_threads,
            turns=turns,
        )
        return build, RetrievalKnobs
    is_cascading = spec.stage == "cascading"
    build_scoring = build_cascading if is_cascading else build_ranking
    scoring = partial(build_scoring, open_memory=open_memory, plan=spec.plan, turns=turns)
    return scoring, CascadingKnobs if is_cascading else RankingKnobs


def stage_deployment(
    spec: StageSpec,
    name: str,
    user_config: dict[str, Any],
    options: dict[str, Any],
) -> Deployment:
    """The deployment of a stage variant, to be bound to its spec; ``options`` are Serve's."""
    return serve.deployment(name=name, user_config=user_config, **options)(StageReplica)
