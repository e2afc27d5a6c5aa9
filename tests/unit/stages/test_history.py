"""Reading rows within a request's time."""

from __future__ import annotations

import time

import numpy as np
import pytest
from serving_models import InProcessReader, make_rows

from marm.memory import Namespace
from stages.history import read_history
from stages.request import StageRequest

DEEP = Namespace(depth=3, dim=8)


def make_request(left_ms: float = 60_000) -> StageRequest:
    deadline_ms = int(time.time() * 1000 + left_ms)
    return StageRequest("r", 5, 10**6, None, 0, 10, deadline_ms)


class SlowReader(InProcessReader):
    """A memory that answers only to those who ask for at most ``layers_in_time`` layers."""

    def __init__(self, layers_in_time: int) -> None:
        super().__init__(DEEP)
        self.layers_in_time = layers_in_time
        self.asked: list[tuple[int, float]] = []
        self.save_for(5, make_rows([3, 1, 4], memorised=2, namespace=DEEP))

    def fetch_available(self, user_ids, n, before_ms=None, *, layers=None, timeout_s=None):
        self.asked.append((layers, timeout_s))
        self.down = layers > self.layers_in_time
        return super().fetch_available(user_ids, n, before_ms, layers=layers, timeout_s=timeout_s)


def test_only_the_layers_that_the_model_reads_are_fetched():
    reader = SlowReader(3)
    history = read_history(reader, make_request(), 16, 2)
    assert [layers for layers, _ in reader.asked] == [2]
    assert (history.depth, len(history), history.note) == (2, 3, "")
    assert (history.read.depth, history.read.memorised, history.read.raw) == (2, 2, 1)


def test_late_rows_become_raw_rows_and_then_none():
    reader = SlowReader(0)
    history = read_history(reader, make_request(), 16, 3)
    assert [layers for layers, _ in reader.asked] == [3, 0]
    assert "raw rows" in history.note
    read = history.read
    assert (read.depth, read.raw, read.memorised, read.missing) == (0, 3, 0, False)
    gone = read_history(SlowReader(-1), make_request(), 16, 3)
    assert (len(gone), gone.note, gone.read.missing) == (0, "", True)


def test_reading_takes_its_budget_and_at_most_half_of_what_is_left():
    reader = SlowReader(0)
    read_history(reader, make_request(), 16, 3, read_ms=30.0)
    read_history(reader, make_request(left_ms=90), 16, 0, read_ms=1000.0)
    read_history(reader, make_request(left_ms=-5), 16, 0)
    first_s, second_s, half_s, nothing_s = (timeout_s for _, timeout_s in reader.asked)
    assert first_s == pytest.approx(0.020)
    assert 0.0 < second_s <= 0.030
    assert 0.0 < half_s <= 0.045
    assert nothing_s == 0.0


def test_a_history_can_be_cut_to_fewer_layers_and_to_nothing():
    history = read_history(SlowReader(3), make_request(), 16, 3)
    lower = history.at_depth(1)
    assert (lower.depth, lower.read.depth, lower.read.memorised) == (1, 1, 2)
    raw = history.at_depth(0)
    assert (raw.read.depth, raw.read.memorised, raw.read.raw) == (0, 0, 3)
    empty = history.without_rows()
    assert (len(empty), empty.now_ms, empty.read.raw) == (0, history.now_ms, 0)
    np.testing.assert_array_equal(empty.rows.counts, [0])
