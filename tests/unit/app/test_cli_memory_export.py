"""What is handed over about a user is complete and plain JSON."""

from __future__ import annotations

import json

import numpy as np
from sample_events import make_events, rows_of_user

from app.cli.memory.export import export_lines, signals_of
from app.cli.session import to_json
from marm.events import BINARY_TASKS, TASKS, pack_feedback
from marm.memory import RAW_STEP, Namespace

NAMESPACE = Namespace(depth=2, dim=4)


def test_every_event_and_row_is_a_line_of_json() -> None:
    events = make_events(5, num_users=1)
    rows = rows_of_user(NAMESPACE, 0, 3).rows
    raw = rows_of_user(NAMESPACE, 0, 1, raw=True).rows
    lines = [
        json.loads(to_json(line))
        for line in export_lines(0, {NAMESPACE: np.concatenate([rows, raw])}, events)
    ]
    assert [line["kind"] for line in lines] == ["event"] * 5 + ["row"] * 4
    for index, line in enumerate(lines[:5]):
        assert line["event_key"] == int(events.event_key[index])
        assert line["item_id"] == events.item_id[index]
        for task, label in zip(TASKS, events.labels[index], strict=True):
            assert line["labels"][task] == (None if np.isnan(label) else float(label))
    for row, line in zip(rows, lines[5:8], strict=True):
        assert line["namespace"] == NAMESPACE.name
        assert line["event_key"] == int(row["event_key"])
        np.testing.assert_array_equal(np.array(line["memory"], np.float16), row["memory"])
    assert (lines[8]["written_step"], lines[8]["memory"]) == (RAW_STEP, None)


def test_signals_are_the_tasks_with_a_positive_label() -> None:
    labels = np.full((1, len(TASKS)), np.nan, np.float32)
    labels[0, [TASKS.index("click"), TASKS.index("follow")]] = 1
    labels[0, TASKS.index("like")] = 0
    labels[0, TASKS.index("watch_time")] = 100
    assert signals_of(int(pack_feedback(labels)[0])) == ["click", "follow"]
    assert signals_of(0) == []
    assert signals_of((1 << len(BINARY_TASKS)) - 1) == list(BINARY_TASKS)
