"""The Serve deployment at the edge: wires a `Service` to handles, log, memory and registry."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve

from app.admission import Admission, AdmissionPolicy
from app.api import create_api
from app.args import AppArgs
from app.background import BackgroundState
from app.experiments.live import LiveRouting
from app.experiments.routing_metrics import CountedExposures, RoutingMetrics
from app.experiments.shadows import ShadowCaller
from app.exposures import RecordAnswers, exposure_writer
from app.feedback import FeedbackService
from app.last_seen import LastSeen
from app.log_sink import LogSink
from app.pool_health import PoolHealth
from app.service import AfterAnswer, Service
from app.serving_metrics import ServingMetrics
from app.stage_calls import Handles, all_statuses, stage_call
from cache_actors.home import Home
from cache_actors.log_writer import connect_log_writer
from cache_actors.pool.client import MemoryClient
from cache_actors.pool.shard_link import PoolInfo
from cache_actors.transfer.restore_mark import restore_awaited
from marm.memory import Namespace
from stages.fallback import FallbackRetrieval
from stages.graph import StageGraph
from stages.pool_memory import PoolMemory
from stages.request import StageResult, StageStatus


@serve.ingress()
class Ingress:
    """HTTP in, answers out."""

    def __init__(self, args: AppArgs, home: Home, pool: PoolInfo, handles: Handles) -> None:
        self._args = args
        self._handles = handles
        self._memory = PoolMemory(pool)
        self._metrics = ServingMetrics()
        self._guards = args.security.guards(home)
        self._routing = LiveRouting(args.routing, args.arms())
        self._exposures = exposure_writer(home, args.routing.exposures)
        self._state = BackgroundState(home, args, self._statuses)
        self._calls = {
            stage: {
                name: stage_call(
                    handle, args.stage(stage).variants[name].group_limits(), self._observe
                )
                for name, handle in by_name.items()
            }
            for stage, by_name in handles.items()
        }
        admission = args.load.admission
        self._service = Service(
            graph=self._graph(),
            experiments=self._routing,
            feedback=self._feedback(home, pool),
            statuses=self._statuses,
            limits=args.limits,
            restore_awaited=partial(
                restore_awaited, pool.directory, required=args.memory.await_restore
            ),
            memory_health=PoolHealth(pool).look,
            settings_problem=lambda: self._routing.problem,
            admission=Admission(
                AdmissionPolicy(
                    admission.max_concurrent, admission.min_concurrent, admission.target_share
                )
            ),
            feedback_admission=Admission(AdmissionPolicy(admission.max_concurrent_feedback)),
            after_answer=self._after_answer(),
            on_outcome=self._metrics.outcome,
        )
        self._state.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application that Serve hosts; called once, after the constructor."""
        return create_api(
            self._service,
            self._args.limits.max_body_bytes,
            self._guards,
            refusal_status=self._args.load.admission.refusal_status,
        )

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take new live settings whole, or keep the old ones and say why."""
        self._routing.reconfigure(user_config)

    async def __del__(self) -> None:
        """Serve calls this when a drained replica ends: what is buffered is written."""
        await asyncio.to_thread(self._exposures.close)

    def _graph(self) -> StageGraph:
        fallback = FallbackRetrieval(
            popular=lambda: self._state.popular,
            similar=lambda: self._state.similar,
            seeds=LastSeen(self._memory.client, lambda: self._state.namespace_of("retrieval")),
            lists=lambda variant: self._state.lists_of(variant),
        )
        return StageGraph(
            self._calls,
            self._args.stage_limits(),
            fallback,
            control=self._args.controls(),
            breaker=self._args.load.breaker.policy(),
            observer=self._metrics,
        )

    def _feedback(self, home: Home, pool: PoolInfo) -> FeedbackService:
        return FeedbackService(
            log=LogSink(connect_log_writer(home, pool.ray_namespace)),
            catalog=lambda: self._state.catalog,
            stores=self._stores,
            timeout_s=self._args.limits.feedback_timeout_s,
        )

    def _after_answer(self) -> list[AfterAnswer]:
        timeouts_ms = {
            stage: limits.timeout_ms for stage, limits in self._args.stage_limits().items()
        }
        metrics = RoutingMetrics()
        exposures = CountedExposures(self._exposures, metrics)
        limits = self._args.routing.shadow_limits
        shadows = ShadowCaller(self._calls, timeouts_ms, exposures, limits, metrics.shadow)
        return [self._metrics.answered, RecordAnswers(exposures), shadows]

    async def _statuses(self) -> list[StageStatus]:
        return await all_statuses(self._handles)

    async def _stores(self) -> dict[Namespace, MemoryClient]:
        namespaces = await self._state.namespaces()
        # Making a client asks the shards where they are, which must not hold the event loop up.
        return {found: await asyncio.to_thread(self._memory.client, found) for found in namespaces}

    def _observe(self, result: StageResult) -> None:
        self._state.observe(result.stage, result.variant, result.namespace)
