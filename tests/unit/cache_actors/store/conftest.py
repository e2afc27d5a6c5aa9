"""Stores in temporary directories, and processes that use them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from stored_rows import OpenStore

from cache_actors.store.shard_store import ShardStore


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[OpenStore]:
    """Opens the store of a directory, ``tmp_path / "shard"`` by default; closed with the test."""
    opened: list[ShardStore] = []

    def open_one(name: str = "shard", **settings: Any) -> ShardStore:
        opened.append(ShardStore(tmp_path / name, **settings))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def other_process() -> Iterator[ProcessPoolExecutor]:
    """Runs functions in one other process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        yield pool
