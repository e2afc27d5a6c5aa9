"""The HTTP interface over a `Service`: routes, error bodies, OpenAPI."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Discriminator, Tag
from starlette.exceptions import HTTPException

from app.admission_gate import AdmissionGate, retry_headers
from app.body_limit import BodyLimit
from app.errors import OverloadedError, RefusedError, UnavailableError
from app.experiments.overrides import ARMS_HEADER, ForbiddenError, parse_overrides
from app.guards import RouteGuards
from app.key_guards import caller_role
from app.schemas import (
    FeedbackBatch,
    FeedbackEvent,
    FeedbackResponse,
    HealthResponse,
    Problem,
    RecommendRequest,
    RecommendResponse,
)
from app.service import Service

REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
MAX_DETAILS = 20

DESCRIPTION = """
Recommends items with a Memory Augmented Recommendation Model: retrieval, cascading, ranking.

What a user did goes to `/feedback` and counts in the same user's next `/recommend`.
"""


def single_or_batch(body: Any) -> str:
    """Which schema a feedback body is checked against."""
    return "batch" if isinstance(body, dict) and "events" in body else "event"


FeedbackBody = Annotated[
    Annotated[FeedbackEvent, Tag("event")] | Annotated[FeedbackBatch, Tag("batch")],
    Discriminator(single_or_batch),
]

RECOMMEND_EXAMPLE = {"user_id": 42, "k": 20, "context": {"context_id": 1}}
FEEDBACK_EXAMPLE = {
    "user_id": 42,
    "item_id": 7,
    "event_id": "a1b2",
    "labels": {"long_view": 1, "watch_time": 31.5},
}
ARMS_HELP = "For testing: arms to use for this request, like `ranking=marm-l4, retrieval=default`."
ANYONE = RouteGuards()
PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The body is not JSON."},
    403: {"model": Problem, "description": "The caller may not do this."},
    413: {"model": Problem, "description": "The body is too large."},
    422: {"model": Problem, "description": "The body is JSON, but not what is expected."},
    429: {"model": Problem, "description": "Overloaded; `Retry-After` says when to try again."},
    503: {"model": Problem, "description": "Not now; the error says what is missing."},
}


def create_api(
    service: Service,
    max_body_bytes: int,
    guards: RouteGuards = ANYONE,
    routers: Sequence[APIRouter] = (),
    refusal_status: int = 429,
) -> FastAPI:
    """The FastAPI application that serves ``service``.

    Args:
        service: what the routes do.
        max_body_bytes: larger bodies are refused.
        guards: the check of the caller in front of every route.
        routers: routes of administration, behind ``guards.admin``.
        refusal_status: HTTP status of a request that is not let in, 429 or 503.
    """
    api = FastAPI(title="MARM", description=DESCRIPTION)
    for router in routers:
        api.include_router(router, dependencies=[Depends(guards.admin)])
    api.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    api.add_exception_handler(RequestValidationError, _on_invalid)
    api.add_exception_handler(RefusedError, _on_refused)
    api.add_exception_handler(UnavailableError, _on_unavailable)
    api.add_exception_handler(HTTPException, _on_http_error)
    api.add_exception_handler(ForbiddenError, _on_forbidden)

    async def on_overload(request: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, OverloadedError)
        response = problem(refusal_status, str(exc), [])
        response.headers.update(retry_headers(exc))
        return response

    api.add_exception_handler(OverloadedError, on_overload)
    # Added last, so that it is the first to see a request.
    api.add_middleware(AdmissionGate, refusals=service.refusals(), status=refusal_status)

    @api.post("/recommend", responses=PROBLEMS, dependencies=[Depends(guards.recommend)])
    async def recommend(
        request: Request,
        body: Annotated[RecommendRequest, Body(examples=[RECOMMEND_EXAMPLE])],
        arms: Annotated[list[str] | None, Header(alias=ARMS_HEADER, description=ARMS_HELP)] = None,
    ) -> RecommendResponse:
        """The best items for a user now."""
        return await service.recommend(
            body, request_id(request), parse_overrides(arms or ()), role=caller_role(request)
        )

    @api.post("/feedback", responses=PROBLEMS, dependencies=[Depends(guards.feedback)])
    async def feedback(
        body: Annotated[FeedbackBody, Body(examples=[FEEDBACK_EXAMPLE])],
    ) -> FeedbackResponse:
        """Store one event, or many as `{"events": [...]}`."""
        return await service.feedback([body] if isinstance(body, FeedbackEvent) else body.events)

    @api.get("/healthz", responses={503: {"model": HealthResponse}})
    async def healthz() -> JSONResponse:
        """200 when requests can be answered, else 503 with the reason."""
        health = await service.health()
        status_code = 503 if health.status in ("no_model", "restoring") else 200
        return JSONResponse(health.model_dump(), status_code=status_code)

    return api


def request_id(request: Request) -> str:
    """The caller's request id when it is a sane one, else a new one."""
    given = request.headers.get(REQUEST_ID_HEADER, "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def problem(status_code: int, error: str, details: list[dict[str, Any]]) -> JSONResponse:
    """An error body."""
    content = Problem(error=error, details=details).model_dump()
    return JSONResponse(content, status_code=status_code)


async def _on_invalid(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, RequestValidationError)
    errors = exc.errors()
    if any(error["type"] == "json_invalid" for error in errors):
        reason = errors[0].get("ctx", {}).get("error", "")
        return problem(400, f"the body must be JSON: {reason}", [])
    # Only place and message: the input itself may be huge, or not even be valid JSON (NaN).
    details = [
        {"where": ".".join(str(part) for part in error["loc"][1:]), "problem": error["msg"]}
        for error in errors[:MAX_DETAILS]
    ]
    hint = "see /docs for what is expected"
    if "json" not in request.headers.get("content-type", ""):
        hint = "send JSON with the header 'Content-Type: application/json'"
    return problem(422, f"the body is not what is expected; {hint}", details)


async def _on_refused(request: Request, exc: Exception) -> JSONResponse:
    return problem(422, str(exc), [])


async def _on_forbidden(request: Request, exc: Exception) -> JSONResponse:
    return problem(403, str(exc), [])


async def _on_unavailable(request: Request, exc: Exception) -> JSONResponse:
    return problem(503, str(exc), [])


async def _on_http_error(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, HTTPException)
    response = problem(exc.status_code, str(exc.detail), [])
    response.headers.update(exc.headers or {})
    return response
