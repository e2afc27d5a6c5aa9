"""Pending rows laid over a fetch give what a fetch after the acknowledgement would give."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from marm.memory import InProcessMemory, Namespace
from train.overlay import Overlay, PendingSave

NAMESPACE = Namespace(depth=1, dim=2, dtype="float32")


class ManualAck:
    """A save that is acknowledged when somebody waits for it."""

    def __init__(self, apply: Callable[[], object]) -> None:
        self._apply, self._is_done = apply, False

    def done(self) -> bool:
        return self._is_done

    def wait(self, timeout_s: float | None = None) -> None:
        if not self._is_done:
            self._apply()
            self._is_done = True


def make_rows(stamps: list[int], mark: int) -> NDArray[np.void]:
    rows = np.zeros(len(stamps), NAMESPACE.row_dtype)
    rows["timestamp_ms"] = stamps
    rows["event_key"] = np.array(stamps, np.uint64) * np.uint64(7)
    rows["written_step"] = mark
    rows["memory"] = mark
    return rows


SAVES = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), min_size=1, max_size=8),
    min_size=1,
    max_size=5,
)


@settings(max_examples=200, deadline=None)
@given(
    saves=SAVES,
    num_settled=st.integers(0, 5),
    seen_anyway=st.integers(0, 5),
    n=st.integers(1, 6),
    before=st.lists(st.integers(0, 31), min_size=4, max_size=4),
)
def test_merge_equals_a_fetch_after_all_saves(
    saves: list[list[tuple[int, int]]],
    num_settled: int,
    seen_anyway: int,
    n: int,
    before: list[int],
) -> None:
    memory, expected = InProcessMemory(NAMESPACE), InProcessMemory(NAMESPACE)
    overlay = Overlay(max_pending=10)
    for mark, pairs in enumerate(saves):
        # One save holds an event once; later saves may repeat it (a replay).
        pairs = sorted(set(pairs))
        users = np.array([user for user, _ in pairs])
        rows = make_rows([stamp for _, stamp in pairs], mark)
        expected.save(users, rows)
        ack = ManualAck(lambda users=users, rows=rows: memory.save(users, rows))
        if mark < num_settled:
            ack.wait()
        elif mark < num_settled + seen_anyway:
            memory.save(users, rows)  # stored, but the acknowledgement is still under way
        overlay.add(PendingSave(users, rows, ack))
    overlay.settle()
    asked, before_ms = np.array([2, 0, 3, 1]), np.array(before)
    merged = overlay.merge(memory.fetch(asked, n, before_ms), n, before_ms)
    reference = expected.fetch(asked, n, before_ms)
    assert merged.offsets.tolist() == reference.offsets.tolist()
    assert merged.rows.tobytes() == reference.rows.tobytes()


def test_flush_waits_for_everything_and_add_bounds_what_is_pending() -> None:
    memory = InProcessMemory(NAMESPACE)
    overlay = Overlay(max_pending=2)
    acks = []
    for stamp in range(5):
        users, rows = np.array([1]), make_rows([stamp], stamp)
        ack = ManualAck(lambda users=users, rows=rows: memory.save(users, rows))
        acks.append(ack)
        overlay.add(PendingSave(users, rows, ack))
    assert [ack.done() for ack in acks] == [True, True, True, False, False]
    overlay.flush()
    assert len(memory.fetch(np.array([1]), 10).rows) == 5


def test_an_update_keeps_what_was_known_before() -> None:
    """A pending second report of an event is laid over the first as the store would merge it."""
    memory, expected = InProcessMemory(NAMESPACE), InProcessMemory(NAMESPACE)
    first, second = make_rows([5, 9], 1), make_rows([5], 2)
    first["feedback"], second["feedback"] = [0b0000001, 0b0000010], [0b0000100]
    users = np.array([1, 1])
    for store in (memory, expected):
        store.save(users, first)
    expected.save(users[:1], second)
    overlay = Overlay()
    overlay.add(PendingSave(users[:1], second, ManualAck(lambda: None)))
    before_ms = np.array([100])
    merged = overlay.merge(memory.fetch(np.array([1]), 10), 10, before_ms)
    assert merged.rows.tobytes() == expected.fetch(np.array([1]), 10).rows.tobytes()
