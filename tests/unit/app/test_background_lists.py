"""The edge remembers what a retrieval variant may return for when the variant is gone."""

from __future__ import annotations

import asyncio
import logging

import pytest
from serving_models import InProcessReader, publish_model

from app.args import AppArgs
from app.background import BackgroundState
from cache_actors.home import Home
from cache_actors.registry import ModelRegistry
from stages.assemble import build_retrieval
from stages.item_filters import NO_LISTS
from stages.knobs import RetrievalKnobs
from stages.live_model import LiveModel
from stages.request import StageStatus
from stages.server import StageServer


@pytest.fixture
def server(tmp_path):
    registry = ModelRegistry(tmp_path / "models")
    publish_model(registry, "retrieval")
    live = LiveModel(
        registry,
        "retrieval",
        "default",
        lambda published: build_retrieval(published, InProcessReader, "exact"),
        logging.getLogger("test"),
    )
    live.poll()
    return StageServer("retrieval", "a", live, RetrievalKnobs)


def test_the_lists_that_a_variant_had_last(tmp_path, server):
    arms = {"a": {"user_config": {"blocked_item_ids": [3]}}, "b": {}}
    args = AppArgs.model_validate({"retrieval": {"variants": arms}})
    answers = [StageStatus("retrieval", "a", None, None, "does not answer")]

    async def statuses() -> list[StageStatus]:
        return answers

    state = BackgroundState(Home(tmp_path / "home").create(), args, statuses)
    asyncio.run(state.refresh_namespaces())
    assert state.lists_of("a").blocked.tolist() == [3]  # as it was started
    assert state.lists_of("b").allowed is None
    assert state.lists_of("unheard") is NO_LISTS
    server.reconfigure({"blocked_item_ids": [5, 4], "allowed_item_ids": [1, 2]})
    answers[:] = [server.status()]
    asyncio.run(state.refresh_namespaces())
    assert state.lists_of("a").blocked.tolist() == [4, 5]
    answers[:] = [StageStatus("retrieval", "a", None, None, "does not answer")]
    asyncio.run(state.refresh_namespaces())
    lists = state.lists_of("a")
    assert lists.blocked.tolist() == [4, 5]
    assert lists.allowed is not None
    assert lists.allowed.tolist() == [1, 2]
