"""A conversion against its plainest statement: event by event, the later step wins."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_events import make_rows

from cache_actors.transfer.convert import convert_namespace
from marm.events import merge_feedback
from marm.memory import RAW_STEP, InProcessMemory, Namespace

WIDE = Namespace(depth=1, dim=2, dtype="float32")
HALF = replace(WIDE, dtype="float16")

# (user, time, event key) -> (written step, feedback)
CONTENT = st.dictionaries(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 2)),
    st.tuples(st.integers(RAW_STEP, 3), st.integers(0, 7)),
    max_size=16,
)
Content = dict[tuple[int, int, int], tuple[int, int]]


def fill(memory: InProcessMemory, content: Content) -> None:
    for (user, stamp, key), (step, feedback) in content.items():
        row = make_rows(memory.namespace, [stamp], step, [key])
        row["feedback"] = feedback
        memory.save(np.array([user]), row)


def content_of(memory: InProcessMemory) -> Content:
    found = memory.fetch(np.arange(1, 4), 1000)
    content = {}
    for user, row in zip(np.repeat(found.user_ids, found.counts).tolist(), found.rows, strict=True):
        step = int(row["written_step"])
        assert (row["memory"] == (0 if step == RAW_STEP else step)).all()
        event = (user, int(row["timestamp_ms"]), int(row["event_key"]))
        content[event] = (step, int(row["feedback"]))
    return content


@settings(max_examples=150, deadline=None)
@given(given=CONTENT, held=CONTENT)
def test_the_later_step_wins_and_feedback_adds_up(given: Content, held: Content) -> None:
    source, target = InProcessMemory(WIDE), InProcessMemory(HALF)
    fill(source, given)
    fill(target, held)
    done = convert_namespace(source, target)
    expected = dict(held)
    for event, (step, feedback) in given.items():
        held_step, held_feedback = held.get(event, (RAW_STEP, 0))
        merged = merge_feedback(np.uint32(held_feedback), np.uint32(feedback))
        expected[event] = (max(step, held_step), int(merged))
    assert content_of(target) == expected
    assert done.rows == len(given)
    assert done.rows_written == sum(expected[event] != held.get(event) for event in given)
    assert content_of(source) == given
    assert convert_namespace(source, target).rows_written == 0
