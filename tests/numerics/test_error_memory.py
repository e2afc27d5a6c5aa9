"""Accumulated errors: streaming equals a loop over each user's life, in batches of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_oracle import TOLERANCE, random_events, random_ranker, stream

from marm.error_memory import COUNT_PRIOR, ITEM_GAIN, RESERVED, state_width
from marm.events import TASKS, EventBatch
from marm.items import ItemFeatures
from marm.memory import InProcessMemory
from marm.ranker import Ranker
from marm.scoring_plan import ScoringPlan

LABEL = TASKS.index("long_view")


def ranker(depth: int = 1, history_length: int = 4) -> Ranker:
    """A random ranker that accumulates errors."""
    return random_ranker(3, depth=depth, history_length=history_length, error_layers=1)


def known_label(events: EventBatch, index: int) -> float:
    """What a row says of its label: nothing where nothing was observed."""
    if np.isnan(events.labels[index]).all():
        return float("nan")
    return float(events.labels[index, LABEL] > 0)


@pytest.mark.parametrize("depth", [1, 3])
def test_states_are_sums_over_the_whole_past(depth: int) -> None:
    events = random_events(np.random.default_rng(0), 3, 60)
    events.labels[::7] = np.nan
    events.timestamp_ms[20:24] = events.timestamp_ms[20]  # simultaneous
    model = ranker(depth)
    logits, rows = stream(model, events, [1], InProcessMemory(model.config.namespace))
    width = state_width(model.config)
    task = model.tasks.index("long_view")
    assert model.net.errors is not None
    asked = torch.stack([as_target(model, events, index) for index in range(len(events))])
    stored = torch.stack([as_row(model, events, index) for index in range(len(events))])
    target, x = asked[:, :width] * ITEM_GAIN, stored[:, :width] * ITEM_GAIN
    for index in range(len(events)):
        past = [
            other
            for other in range(len(events))
            if events.user_id[other] == events.user_id[index]
            and events.timestamp_ms[other] < events.timestamp_ms[index]
        ]
        total = torch.zeros(width)
        for other in past:
            label = known_label(events, other)
            if not np.isnan(label):
                total += (label - torch.sigmoid(rows[other, 0, -RESERVED])) * x[other]
        state = total / np.sqrt(len(past) + COUNT_PRIOR)
        torch.testing.assert_close(rows[index, 0, :width], state, atol=TOLERANCE, rtol=1e-4)
        correction = model.net.errors.weight[task] @ (target[index] * state)
        expected = rows[index, 0, -RESERVED] + correction
        torch.testing.assert_close(logits[index, task], expected, atol=TOLERANCE, rtol=1e-4)


def as_row(model: Ranker, events: EventBatch, index: int) -> torch.Tensor:
    """The embedding of an event as a row: where it was shown counts, how long it is does not."""
    columns = {
        "item": events.item_id,
        "author": events.author_id,
        "tag": events.tag_id,
        "context": events.context_id,
    }
    slots = [int(model.table.slots(name, ids[index])) for name, ids in columns.items()]
    return model.table.weight[slots].sum(dim=0)


def as_target(model: Ranker, events: EventBatch, index: int) -> torch.Tensor:
    """The embedding of an event's item as a target."""
    one = events.take(slice(index, index + 1))
    slots = model.inputs.item_slots(
        ItemFeatures(one.item_id, one.author_id, one.tag_id, one.duration_ms)
    )
    return model.table.weight[torch.from_numpy(slots[0])].sum(dim=0)


@pytest.mark.parametrize("batch_sizes", [[7], [60], [1, 30]])
def test_batches_change_nothing(batch_sizes: list[int]) -> None:
    events = random_events(np.random.default_rng(1), 2, 60)
    model = ranker(2)
    logits, rows = stream(model, events, [1], InProcessMemory(model.config.namespace))
    memory = InProcessMemory(model.config.namespace)
    others, other_rows = stream(model, events, batch_sizes, memory)
    torch.testing.assert_close(others, logits, atol=TOLERANCE, rtol=1e-4)
    torch.testing.assert_close(other_rows, rows, atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_request_is_scored_as_the_event_was_predicted(frozen: bool) -> None:
    events = random_events(np.random.default_rng(2), 1, 30)
    model = ranker(2)
    memory = InProcessMemory(model.config.namespace)
    stream(model, events.take(slice(0, 29)), [5], memory)
    last = events.take(slice(29, 30))
    rows = memory.fetch(last.user_id, model.config.history_length, last.timestamp_ms)
    expected, _ = stream(model, last, [1], memory)
    if frozen:
        model.freeze(ScoringPlan())
    candidates = ItemFeatures(
        np.repeat(last.item_id, 2),
        np.repeat(last.author_id, 2),
        np.repeat(last.tag_id, 2),
        np.repeat(last.duration_ms, 2),
    )
    user, now, context = (
        int(column[0]) for column in (last.user_id, last.timestamp_ms, last.context_id)
    )
    scores = model.score(rows, user, candidates, now, context)
    np.testing.assert_allclose(scores[0], scores[1])
    np.testing.assert_allclose(scores[0], model.probabilities(expected)[0], rtol=1e-4, atol=1e-5)


def test_counts_beyond_half_precision_are_kept() -> None:
    model = ranker()
    assert model.net.errors is not None
    for count in (0.0, 1.0, 2047.0, 2049.0, 1_000_003.0):
        parts = torch.tensor([0.0, count // 1024 / 256, count % 1024 / 256]).half().float()
        assert (parts[1] * 1024 + parts[2]) * 256 == count


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0, "error_layers": 1}, "needs a stored layer"),
        ({"error_layers": 2}, "must be 0 or 1"),
        ({"error_layers": 1, "tasks": ("click",)}, "positive_task among tasks"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_ranker(0, **settings)
