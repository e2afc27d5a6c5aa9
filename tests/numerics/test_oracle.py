"""The project's first test: streaming through the memory equals the O(n^2) decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marm.config import ModelConfig
from marm.events import TASKS, EventBatch
from marm.items import ItemFeatures
from marm.memory import InProcessMemory, Namespace, UserRows
from marm.model_factory import build_model
from marm.ranker import Ranker
from marm.reference import decode_history
from marm.sequence import enters_sequence, raw_rows

TOLERANCE = 1e-5


def random_events(rng: np.random.Generator, num_users: int, num_events: int) -> EventBatch:
    """Events of several users in global time order, strictly increasing within a user."""
    timestamps = np.sort(rng.choice(10_000_000, num_events, replace=False)) + 1_600_000_000_000
    labels = (rng.random((num_events, len(TASKS))) < 0.4).astype(np.float32)
    labels[:, -1] = rng.exponential(20.0, num_events)
    labels[rng.random(labels.shape) < 0.2] = np.nan
    return EventBatch(
        user_id=rng.integers(-3, num_users - 3, num_events),
        item_id=rng.integers(0, 50, num_events) * 10**14,
        timestamp_ms=timestamps,
        event_key=rng.integers(0, 2**63, num_events).astype(np.uint64),
        author_id=rng.integers(0, 9, num_events),
        tag_id=rng.integers(0, 5, num_events),
        duration_ms=rng.integers(0, 90_000, num_events),
        context_id=rng.integers(0, 3, num_events).astype(np.int32),
        labels=labels,
    )


def random_ranker(seed: int, **settings_: object) -> Ranker:
    """A ranker whose every parameter is random, biases and priors included."""
    depth = int(settings_.pop("depth", 2))  # type: ignore[call-overload]
    sequence = str(settings_.pop("sequence", "all"))
    namespace = Namespace(depth=depth, dim=16, dtype="float32", sequence=sequence)
    config = ModelConfig(
        namespace=namespace,
        depth=depth,
        attention_dim=16,
        feature_dim=12,
        num_slots=4096,
        **settings_,  # type: ignore[arg-type]
    )
    torch.manual_seed(seed)
    model = build_model(config)
    assert isinstance(model, Ranker)
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.table.weight.mul_(4)
        model.stats.counts.uniform_(0, 9)
        model.stats.sums.copy_(model.stats.counts * torch.rand_like(model.stats.sums))
        model.stats.total_counts.fill_(100.0)
        model.stats.total_sums.fill_(40.0)
    return model.eval()


def stream(
    model: Ranker, events: EventBatch, batch_sizes: list[int], memory: InProcessMemory
) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 1 over micro-batches: logits and rows of every event, in order."""
    logits, rows_out, start, turn = [], [], 0, 0
    while start < len(events):
        size = batch_sizes[turn % len(batch_sizes)]
        batch = events.take(slice(start, start + size))
        users = np.unique(batch.user_id)
        before = np.array([batch.timestamp_ms[batch.user_id == u].min() for u in users])
        stored = memory.fetch(users, model.config.history_length, before)
        inputs = model.inputs.for_training(batch, stored)
        with torch.no_grad():
            prior = model.item_prior(model.item_slots(inputs))
            predicted = model.net(model.embed(inputs), prior)
            out, rows = predicted.best, predicted.rows_BLD
        logits.append(out)
        rows_out.append(rows)
        saved = raw_rows(batch, memory.namespace.row_dtype)
        saved["memory"], saved["written_step"] = rows.numpy(), turn
        keep = enters_sequence(batch, memory.namespace.sequence)
        memory.save(batch.user_id[keep], saved[keep])
        start, turn = start + size, turn + 1
    return torch.cat(logits), torch.cat(rows_out)


@pytest.mark.parametrize("sequence", ["all", "long_view"])
@pytest.mark.parametrize("depth", [0, 1, 3])
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    num_users=st.integers(1, 6),
    history_length=st.integers(1, 12),
    batch_sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
)
def test_streaming_equals_reference(
    depth: int,
    sequence: str,
    seed: int,
    num_users: int,
    history_length: int,
    batch_sizes: list[int],
) -> None:
    rng = np.random.default_rng(seed)
    events = random_events(rng, num_users, 60)
    model = random_ranker(seed, depth=depth, sequence=sequence, history_length=history_length)
    memory = InProcessMemory(model.config.namespace)
    logits, rows = stream(model, events, batch_sizes, memory)
    for user in np.unique(events.user_id):
        own = np.flatnonzero(events.user_id == user)
        expected = decode_history(model, events.take(own))
        torch.testing.assert_close(logits[own], expected.logits_PT, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(rows[own], expected.rows_PLD, atol=TOLERANCE, rtol=TOLERANCE)
        stored = memory.fetch(np.array([user]), 1000)
        keep = enters_sequence(events.take(own), sequence)
        np.testing.assert_allclose(
            stored.rows["memory"], expected.rows_PLD.numpy()[keep], atol=TOLERANCE, rtol=TOLERANCE
        )


def test_future_events_never_change_past_outputs() -> None:
    rng = np.random.default_rng(5)
    events = random_events(rng, 4, 80)
    changed = EventBatch(
        **{
            **{name: getattr(events, name).copy() for name in events.__dataclass_fields__},
            "item_id": np.where(np.arange(80) < 50, events.item_id, 7),
            "labels": np.where(np.arange(80)[:, None] < 50, events.labels, 1.0).astype(np.float32),
        }
    )
    model = random_ranker(1)
    first, _ = stream(model, events, [16], InProcessMemory(model.config.namespace))
    second, _ = stream(model, changed, [16], InProcessMemory(model.config.namespace))
    torch.testing.assert_close(first[:50], second[:50], rtol=0, atol=0)
    assert not torch.allclose(first[50:], second[50:])


def _history_of(model: Ranker, num_rows: int) -> UserRows:
    events = random_events(np.random.default_rng(3), 1, num_rows)
    memory = InProcessMemory(model.config.namespace)
    stream(model, events, [32], memory)
    return memory.fetch(np.array([-3]), 1000)


@pytest.mark.parametrize("num_rows", [0, 1, 120])
def test_scoring_many_candidates_equals_scoring_one_by_one(num_rows: int) -> None:
    model = random_ranker(2, history_length=100)
    rows = (
        _history_of(model, num_rows)
        if num_rows
        else InProcessMemory(model.config.namespace).fetch(np.array([-3]), 10)
    )
    events = random_events(np.random.default_rng(9), 1, 500)
    items = model_items(events)
    now = 1_700_000_000_000
    together = model.score(rows, -3, items, now, 1)
    alone = np.concatenate(
        [model.score(rows, -3, items.take(slice(i, i + 1)), now, 1) for i in range(500)]
    )
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)


def test_candidates_never_influence_each_other() -> None:
    model = random_ranker(2)
    rows = _history_of(model, 60)
    items = model_items(random_events(np.random.default_rng(9), 1, 50))
    order = np.random.default_rng(0).permutation(50)
    now = 1_700_000_000_000
    np.testing.assert_allclose(
        model.score(rows, -3, items, now)[order],
        model.score(rows, -3, items.take(order), now),
        rtol=1e-5,
        atol=1e-6,
    )


def model_items(events: EventBatch) -> ItemFeatures:
    return ItemFeatures(events.item_id, events.author_id, events.tag_id, events.duration_ms)


def test_training_scores_equal_serving_scores() -> None:
    """What training predicted for an event is what serving answers for the same moment."""
    model = random_ranker(4)
    events = random_events(np.random.default_rng(8), 3, 90)
    memory = InProcessMemory(model.config.namespace)
    logits, _ = stream(model, events, [13], memory)
    for index in (0, 40, 89):
        user, stamp = int(events.user_id[index]), int(events.timestamp_ms[index])
        rows = memory.fetch(
            np.array([user]), model.config.history_length, np.array([stamp], np.int64)
        )
        item = model_items(events.take(slice(index, index + 1)))
        served = model.score(rows, user, item, stamp, int(events.context_id[index]))
        np.testing.assert_allclose(
            served[0], model.probabilities(logits[index : index + 1])[0], rtol=1e-4, atol=1e-5
        )
