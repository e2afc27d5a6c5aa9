"""Bodies that are large, deep, in crumbs or not numbers cost little and are refused clearly."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import Body, FastAPI
from fastapi.exceptions import RequestValidationError

from app.api import _on_invalid
from app.body_limit import BodyLimit
from app.schemas import MAX_ALLOWED, MAX_EVENTS, MAX_EXCLUDED, FeedbackBatch, RecommendRequest

LIMIT = 200_000


def post(path: str, content) -> httpx.Response:
    api = FastAPI()
    api.add_middleware(BodyLimit, max_bytes=LIMIT)
    api.add_exception_handler(RequestValidationError, _on_invalid)

    @api.post("/recommend")
    async def recommend(body: RecommendRequest = Body()) -> int:  # noqa: B008
        return body.user_id

    @api.post("/feedback")
    async def feedback(body: FeedbackBatch = Body()) -> int:  # noqa: B008
        return len(body.events)

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(api, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
            headers = {"content-type": "application/json"}
            return await client.post(path, content=content, headers=headers)

    return asyncio.run(send())


def test_a_body_in_crumbs_arrives_whole() -> None:
    async def crumbs():
        for byte in b'{"user_id": 12345}':
            yield bytes([byte])

    response = post("/recommend", crumbs())
    assert (response.status_code, response.json()) == (200, 12345)


def test_an_endless_body_is_cut_off() -> None:
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 1000
            yield b" " * 1000

    assert post("/recommend", endless()).status_code == 413
    assert sent <= LIMIT + 1000


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"user_id":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"user_id": ' + b"9" * 5000 + b"}",
        b'{"user_id": NaN}',
        b'{"user_id": 1e999}',
        b'{"user_id": -1}',
        b'{"user_id": "1"}',
        b'{"user_id": 1, "context": {"context_id": NaN}}',
        b'{"user_id": 1, "k": 1e3}',
        b"\xff\xfe",
        b'"x"',
        b"",
    ],
)
def test_what_is_no_request_is_refused(content: bytes) -> None:
    assert post("/recommend", content).status_code in (400, 422)


def test_lists_have_an_end() -> None:
    numbers = ",".join("1" for _ in range(MAX_EXCLUDED + 1))
    body = f'{{"user_id": 1, "context": {{"exclude_item_ids": [{numbers}]}}}}'
    assert post("/recommend", body.encode()).status_code == 422
    numbers = ",".join("1" for _ in range(MAX_ALLOWED + 1))
    body = f'{{"user_id": 1, "context": {{"allow_item_ids": [{numbers}]}}}}'
    assert post("/recommend", body.encode()).status_code == 422
    events = ",".join('{"user_id": 1, "item_id": 2}' for _ in range(MAX_EVENTS + 1))
    assert post("/feedback", f'{{"events": [{events}]}}'.encode()).status_code == 422
