"""Requests of several users computed together."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from serving_models import make_rows, small_config, some_items, wait_until

from marm.memory import UserRows
from marm.model_factory import build_model
from stages.batching import NotScoredError, ScoreBatcher, ScoreRequest, score_one

MINUTE_MS = 60_000.0


def request_of(user_id: int, num_rows: int = 4) -> ScoreRequest:
    rows = make_rows(list(range(1, num_rows + 1)), memorised=2)
    packed = UserRows(np.array([user_id]), np.array([0, num_rows]), rows)
    return ScoreRequest(packed, user_id, some_items(10), 10**6, 0)


def in_ms(left_ms: float) -> float:
    return time.time() * 1000 + left_ms


class GatedModel:
    """Answers with the user's id when its gate is open; notes whom it was asked for."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.asked: list[int] = []

    def score(self, rows, user_id, candidates, now_ms, context_id):
        self.asked.append(user_id)
        assert self.gate.wait(30)
        if user_id < 0:
            raise ValueError("no such user")
        return np.full(len(candidates), user_id, np.float32)


@pytest.fixture
def threads():
    with ThreadPoolExecutor(8) as pool:
        yield pool


def test_batched_scores_equal_those_alone(threads):
    torch.manual_seed(0)
    model = build_model(small_config("ranking")).eval()
    batcher = ScoreBatcher(model)
    requests = [request_of(user, num_rows=user % 5 + 1) for user in range(24)]
    answers = threads.map(lambda each: batcher.score(each, in_ms(MINUTE_MS), 5.0, 8), requests)
    for request, scores in zip(requests, answers, strict=True):
        np.testing.assert_array_equal(scores, score_one(model, request))
    assert batcher.counts.requests == 24
    assert batcher.counts.batches <= 24


def held_up(model, threads, batcher, users, deadline_ms=MINUTE_MS):
    """Requests of ``users`` waiting while that of user 1 is computed."""
    first = threads.submit(batcher.score, request_of(1), in_ms(MINUTE_MS), 0.0, 8)
    wait_until(lambda: model.asked == [1])
    waiting = [
        threads.submit(batcher.score, request_of(user), in_ms(deadline_ms), 0.0, 8)
        for user in users
    ]
    return first, waiting


def test_what_comes_while_one_is_computed_is_the_next_batch(threads):
    model = GatedModel()
    batcher = ScoreBatcher(model)
    first, waiting = held_up(model, threads, batcher, (2, 3, 4))
    wait_until(lambda: len(batcher._waiting) == 3)
    model.gate.set()
    assert first.result()[0] == 1
    assert [int(each.result()[0]) for each in waiting] == [2, 3, 4]
    assert (batcher.counts.batches, batcher.counts.requests) == (2, 4)
    assert sorted(model.asked) == [1, 2, 3, 4]


def test_a_batch_is_no_larger_than_allowed(threads):
    model = GatedModel()
    batcher = ScoreBatcher(model)
    first = threads.submit(batcher.score, request_of(1), in_ms(MINUTE_MS), 0.0, 2)
    wait_until(lambda: model.asked == [1])
    waiting = [
        threads.submit(batcher.score, request_of(user), in_ms(MINUTE_MS), 0.0, 2)
        for user in (2, 3, 4)
    ]
    wait_until(lambda: len(batcher._waiting) == 3)
    model.gate.set()
    assert [int(each.result()[0]) for each in (first, *waiting)] == [1, 2, 3, 4]
    assert (batcher.counts.batches, batcher.counts.requests) == (3, 4)


def test_a_request_that_fails_does_not_fail_those_beside_it(threads):
    model = GatedModel()
    batcher = ScoreBatcher(model)
    first, (good, bad) = held_up(model, threads, batcher, (2, -3))
    wait_until(lambda: len(batcher._waiting) == 2)
    model.gate.set()
    assert (first.result()[0], good.result()[0]) == (1, 2)
    with pytest.raises(ValueError, match="no such user"):
        bad.result()
    assert batcher.score(request_of(5), in_ms(MINUTE_MS), 0.0, 8)[0] == 5


def test_a_request_is_given_up_at_its_deadline_and_never_computed(threads):
    model = GatedModel()
    batcher = ScoreBatcher(model)
    first, (late,) = held_up(model, threads, batcher, (2,), deadline_ms=20.0)
    with pytest.raises(NotScoredError, match="its time was over"):
        late.result(timeout=30)
    assert not first.done()
    model.gate.set()
    assert first.result()[0] == 1
    with pytest.raises(NotScoredError):
        batcher.score(request_of(3), in_ms(-1), 0.0, 8)
    assert model.asked == [1]
    assert batcher.counts.given_up == 2


def test_more_requests_than_may_wait_are_refused(threads):
    model = GatedModel()
    batcher = ScoreBatcher(model, max_waiting=1)
    first, (second,) = held_up(model, threads, batcher, (2,))
    wait_until(lambda: len(batcher._waiting) == 1)
    with pytest.raises(NotScoredError, match="1 requests wait"):
        batcher.score(request_of(3), in_ms(MINUTE_MS), 0.0, 8)
    model.gate.set()
    assert (first.result()[0], second.result()[0]) == (1, 2)


def test_the_window_closes_early_when_the_batch_is_full(threads):
    model = GatedModel()
    model.gate.set()
    batcher = ScoreBatcher(model)
    waiting = [
        threads.submit(batcher.score, request_of(user), in_ms(MINUTE_MS), 30_000.0, 3)
        for user in (1, 2, 3)
    ]
    assert [int(each.result(timeout=20)[0]) for each in waiting] == [1, 2, 3]
    assert (batcher.counts.batches, sorted(model.asked)) == (1, [1, 2, 3])
