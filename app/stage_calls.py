"""Serve handles as what `stages.graph` calls: cancellation and full queues put into its words."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from stages.grouped_calls import GroupedCalls, GroupLimits, Reply
from stages.request import StageName, StageRequest, StageResult, StageStatus
from stages.variant import QueueFullError, StageCall

STATUS_TIMEOUT_S = 2.0

Handles = dict[StageName, dict[str, DeploymentHandle]]


def stage_call(
    handle: DeploymentHandle, limits: GroupLimits, observe: Callable[[StageResult], None]
) -> StageCall:
    """A call of a variant, with what else waits for the same; ``observe`` sees every answer.

    When nobody waits for it any more, for time is over or clients have gone, it is cancelled in the
    replica.
    """
    # Requests and results are plain data of modules that both sides have, which the C pickler
    # writes in half the time of cloudpickle, Serve's default.
    run = handle.options(
        method_name="run", request_serialization="pickle", response_serialization="pickle"
    )

    async def send(requests: tuple[StageRequest, ...]) -> Reply:
        response = run.remote(requests)
        try:
            results: Reply = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError as error:
            raise QueueFullError(str(error)) from error
        for result in results:
            if result is not None:
                observe(result)
        return results

    return GroupedCalls(send, limits)


async def all_statuses(handles: Handles) -> list[StageStatus]:
    """The status of every variant, asked at once."""
    asked = [
        stage_status(stage, name, handle)
        for stage, by_name in handles.items()
        for name, handle in by_name.items()
    ]
    return await asyncio.gather(*asked)


async def stage_status(stage: StageName, variant: str, handle: DeploymentHandle) -> StageStatus:
    """A variant's status; one that does not answer is a problem, not an error."""
    try:
        return await asyncio.wait_for(_ask_status(handle), STATUS_TIMEOUT_S)
    except Exception as error:
        problem = f"{stage}/{variant} does not answer ({type(error).__name__})"
        return StageStatus(stage, variant, None, None, problem)


async def _ask_status(handle: DeploymentHandle) -> StageStatus:
    return await handle.status.remote()
