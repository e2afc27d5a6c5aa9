"""Saves on their way to a shard: order, gathering, back-pressure and failure."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from cache_actors.pool.save_queue import SaveAck, SaveQueue, Send
from marm.memory import Namespace

DTYPE = Namespace(depth=0).row_dtype
DEADLINE_S = 30.0


def make_rows(values: list[int]) -> np.ndarray:
    rows = np.zeros(len(values), DTYPE)
    rows["item_id"] = values
    return rows


class Shard:
    """Takes sends only when it is told to, and keeps what it took."""

    def __init__(self) -> None:
        self.sends: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self.allowed = threading.Semaphore(0)
        self.failures: list[Exception] = []

    def prepare(self, user_ids: np.ndarray, rows: np.ndarray) -> Send:
        assert user_ids.tolist() == rows["item_id"].tolist()
        return lambda: self.send(rows)

    def send(self, rows: np.ndarray) -> None:
        self.entered.release()
        assert self.allowed.acquire(timeout=DEADLINE_S)
        if self.failures:
            raise self.failures.pop(0)
        self.sends.append(rows["item_id"].tolist())


def put(queue: SaveQueue, values: list[int]) -> SaveAck:
    return SaveAck([queue.put(np.array(values), make_rows(values))])


def test_saves_that_wait_are_joined_in_order() -> None:
    shard = Shard()
    queue = SaveQueue(shard.prepare, max_pending=10, max_rows_per_send=4, name="test")
    acks = [put(queue, [0])]
    assert shard.entered.acquire(timeout=DEADLINE_S)
    acks += [put(queue, values) for values in ([1, 2], [3, 4], [5], [6, 7, 8, 9, 10, 11])]
    assert not acks[0].done()
    with pytest.raises(TimeoutError, match="still being sent"):
        acks[0].wait(0.0)
    shard.allowed.release(10)
    for ack in acks:
        ack.wait(DEADLINE_S)
        assert ack.done()
    assert shard.sends == [[0], [1, 2, 3, 4], [5], [6, 7, 8, 9], [10, 11]]
    queue.close()


def test_a_put_blocks_while_too_many_saves_are_under_way() -> None:
    shard = Shard()
    queue = SaveQueue(shard.prepare, max_pending=2, max_rows_per_send=1, name="test")
    put(queue, [0])
    put(queue, [1])
    third = threading.Thread(target=put, args=(queue, [2]))
    third.start()
    assert shard.entered.acquire(timeout=DEADLINE_S)
    third.join(0.05)
    assert third.is_alive()
    shard.allowed.release(3)
    third.join(DEADLINE_S)
    assert not third.is_alive()
    queue.close()
    assert shard.sends == [[0], [1], [2]]


def test_a_failed_save_says_so_and_later_ones_go_on() -> None:
    shard = Shard()
    shard.failures = [OSError("the disk is full")]
    queue = SaveQueue(shard.prepare, max_pending=4, max_rows_per_send=1, name="test")
    shard.allowed.release(4)
    failed = put(queue, [0])
    with pytest.raises(OSError, match="the disk is full"):
        failed.wait(DEADLINE_S)
    assert not failed.done()
    put(queue, [1]).wait(DEADLINE_S)
    queue.close()
    assert shard.sends == [[1]]


def test_a_timeout_of_the_save_itself_is_not_mistaken_for_waiting_too_short() -> None:
    shard = Shard()
    shard.failures = [TimeoutError("the shard gave up")]
    queue = SaveQueue(shard.prepare, max_pending=4, max_rows_per_send=1, name="test")
    shard.allowed.release(1)
    with pytest.raises(TimeoutError, match="the shard gave up"):
        put(queue, [0]).wait(DEADLINE_S)
    queue.close()


def test_closing_sends_what_is_queued_and_refuses_more() -> None:
    shard = Shard()
    queue = SaveQueue(shard.prepare, max_pending=4, max_rows_per_send=1, name="test")
    acks = [put(queue, [value]) for value in range(3)]
    shard.allowed.release(3)
    queue.close()
    assert all(ack.done() for ack in acks)
    with pytest.raises(RuntimeError, match="closed"):
        put(queue, [4])
    queue.close()


def test_an_acknowledgement_of_nothing_is_given() -> None:
    ack = SaveAck([])
    assert ack.done()
    ack.wait()
