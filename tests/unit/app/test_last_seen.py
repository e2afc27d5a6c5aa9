from __future__ import annotations

import asyncio
import time

import numpy as np
from serving_models import NAMESPACE, InProcessReader

from app.last_seen import LastSeen
from marm.memory import RAW_STEP
from stages.request import StageRequest


def make_request(before_ms: int | None = None) -> StageRequest:
    deadline_ms = int(time.time() * 1000) + 60_000
    return StageRequest("r", 7, 10**9, before_ms, 0, 5, deadline_ms)


def reader_with_rows() -> InProcessReader:
    reader = InProcessReader()
    rows = np.zeros(3, NAMESPACE.row_dtype)
    rows["item_id"], rows["timestamp_ms"], rows["written_step"] = [4, 5, 6], [1, 2, 3], RAW_STEP
    reader.memory.save(np.full(3, 7), rows)
    return reader


def look(reader, request, namespace=NAMESPACE) -> list[int]:
    seen = LastSeen(lambda space: reader, lambda: namespace)
    return asyncio.run(seen(request)).tolist()


def test_the_newest_items_come_first():
    reader = reader_with_rows()
    assert look(reader, make_request()) == [6, 5, 4]
    assert look(reader, make_request(before_ms=3)) == [5, 4]


def test_without_memory_nothing_is_known():
    reader = reader_with_rows()
    reader.down = True
    assert look(reader, make_request()) == []
    assert look(reader, make_request(), namespace=None) == []
