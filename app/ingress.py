"""The Serve deployment at the edge: wires a `Service` to handles, log, memory and registry."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from app.ab import arm_table
from app.api import create_api
from app.args import AppArgs
from app.background import BackgroundState
from app.feedback import FeedbackService
from app.log_sink import LogSink
from app.pool_health import PoolHealth
from app.service import Service
from cache_actors.home import Home
from cache_actors.log_writer import connect_log_writer
from cache_actors.pool.client import MemoryClient
from cache_actors.pool.shard_link import PoolInfo
from cache_actors.transfer.restore_mark import restore_awaited
from marm.memory import Namespace
from stages.graph import StageCall, StageGraph
from stages.pool_memory import PoolMemory
from stages.request import StageName, StageRequest, StageResult, StageStatus

STATUS_TIMEOUT_S = 2.0

Handles = dict[StageName, dict[str, DeploymentHandle]]


@serve.ingress()
class Ingress:
    """HTTP in, answers out."""

    def __init__(self, args: AppArgs, home: Home, pool: PoolInfo, handles: Handles) -> None:
        self._args = args
        self._handles = handles
        self._memory = PoolMemory(pool)
        self._state = BackgroundState(home, args, self._statuses)
        calls = {
            stage: {name: self._stage_call(handle) for name, handle in by_name.items()}
            for stage, by_name in handles.items()
        }
        feedback = FeedbackService(
            log=LogSink(connect_log_writer(home, pool.ray_namespace)),
            catalog=lambda: self._state.catalog,
            stores=self._stores,
            timeout_s=args.limits.feedback_timeout_s,
        )
        self._service = Service(
            graph=StageGraph(calls, args.stage_limits(), lambda: self._state.popular),
            arms=arm_table({}, args.arms()),
            feedback=feedback,
            statuses=self._statuses,
            limits=args.limits,
            restore_awaited=partial(
                restore_awaited, pool.directory, required=args.memory.await_restore
            ),
            memory_health=PoolHealth(pool).look,
        )
        self._state.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application that Serve hosts; called once, after the constructor."""
        return create_api(self._service, self._args.limits.max_body_bytes)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take new live settings whole, or raise and keep the old ones."""
        self._service.arms = arm_table(user_config, self._args.arms())

    async def _statuses(self) -> list[StageStatus]:
        asked = [
            stage_status(stage, name, handle)
            for stage, by_name in self._handles.items()
            for name, handle in by_name.items()
        ]
        return await asyncio.gather(*asked)

    async def _stores(self) -> dict[Namespace, MemoryClient]:
        namespaces = await self._state.namespaces()
        # Making a client asks the shards where they are, which must not hold the event loop up.
        return {found: await asyncio.to_thread(self._memory.client, found) for found in namespaces}

    def _stage_call(self, handle: DeploymentHandle) -> StageCall:
        async def call(request: StageRequest) -> StageResult:
            result = await handle.run.remote(request)
            self._state.observe(result.stage, result.variant, result.namespace)
            return result

        return call


async def stage_status(stage: StageName, variant: str, handle: DeploymentHandle) -> StageStatus:
    """A variant's status; one that does not answer is a problem, not an error."""
    try:
        return await asyncio.wait_for(_ask_status(handle), STATUS_TIMEOUT_S)
    except Exception as error:
        problem = f"{stage}/{variant} does not answer ({type(error).__name__})"
        return StageStatus(stage, variant, None, None, problem)


async def _ask_status(handle: DeploymentHandle) -> StageStatus:
    return await handle.status.remote()
