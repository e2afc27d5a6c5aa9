"""Losses against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sample_events import fetch_for, make_events, make_items, replaced, rows_of_user, small_model

from marm.events import TASKS, EventBatch
from marm.memory import InProcessMemory
from marm.ranker import Ranker
from marm.retriever import TEMPERATURE, Retriever


def retriever() -> Retriever:
    model = small_model("retrieval")
    assert isinstance(model, Retriever)
    return model


def ranker(**settings: object) -> Ranker:
    model = small_model("ranking", **settings)
    assert isinstance(model, Ranker)
    return model


def batch_of(positive: list[float], items: list[int]) -> EventBatch:
    events = make_events(len(items))
    labels = np.full((len(items), len(TASKS)), np.nan, np.float32)
    labels[:, TASKS.index("long_view")] = positive
    return replaced(events, labels=labels, item_id=np.array(items, np.int64))


def retrieval_loss(model: Retriever, events: EventBatch) -> tuple[float, float, np.ndarray]:
    """The model's loss, the same in a loop, and the scores."""
    rows = fetch_for(events, InProcessMemory(model.config.namespace), 10)
    inputs = model.inputs.for_training(events, rows)
    with torch.no_grad():
        output = model.training_forward(model.net, model.embed(inputs), events.labels)
        users, items = (part.double().numpy() for part in model.net(model.embed(inputs))[:2])
    slots = inputs.target_slots_BK[:, 0]
    exposures = model.stats.exposures.double().numpy()
    total = exposures.sum() + len(exposures)
    loss = 0.0
    for i in range(len(events)):
        if not events.labels[i, TASKS.index("long_view")] > 0:
            continue
        logits = {}
        for j in range(len(events)):
            if j != i and slots[j] == slots[i]:
                continue  # the same item is no negative
            log_q = math.log((exposures[slots[j]] + 1) / total)
            logits[j] = users[i] @ items[j] / TEMPERATURE - log_q
        loss += math.log(sum(math.exp(value) for value in logits.values())) - logits[i]
    return float(output.loss_sum), loss, output.scores_BT


def test_retrieval_is_a_softmax_over_the_batch_with_log_q() -> None:
    model = retriever()
    model.stats.exposures.copy_(torch.randint(0, 50, (model.config.num_slots,)))
    events = batch_of([1, 0, 1, float("nan"), 1, 0], [1, 2, 3, 4, 5, 6])
    fast, slow, scores = retrieval_loss(model, events)
    assert slow > 0
    assert fast == pytest.approx(slow, rel=1e-4)
    assert scores.shape == (6, 1)
    assert model.num_labels(events.labels) == 3


def test_the_positive_item_is_no_negative_of_itself() -> None:
    model = retriever()
    model.stats.exposures.copy_(torch.randint(0, 50, (model.config.num_slots,)))
    fast, slow, _ = retrieval_loss(model, batch_of([1, 1, 0, 1, 1], [7, 7, 7, 8, 9]))
    assert fast == pytest.approx(slow, rel=1e-4)
    # When the whole batch is one item nothing is left to tell apart.
    fast, slow, _ = retrieval_loss(model, batch_of([1, 1, 0], [7, 7, 7]))
    assert fast == pytest.approx(0.0, abs=1e-5)
    assert slow == pytest.approx(0.0, abs=1e-9)


def test_popular_negatives_are_discounted() -> None:
    model, events = retriever(), batch_of([1, 0, 0], [1, 2, 3])
    plain = retrieval_loss(model, events)[0]
    slots = model.table.slots("item", events.item_id)
    model.stats.exposures[slots[1]] = 10_000
    assert retrieval_loss(model, events)[0] < plain


def test_retrieval_vectors_have_unit_length_and_give_the_training_scores() -> None:
    model = retriever()
    rows = rows_of_user(model.config.namespace, 3, 6)
    items = make_items(20)
    vectors = model.item_vectors(items)
    user = model.user_vector(rows, 3, 1_700_000_000_000, 1)
    assert user.shape == (5,)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    assert np.linalg.norm(user) == pytest.approx(1.0, rel=1e-5)


def test_popularity_orders_by_rate_and_by_exposures() -> None:
    model = retriever()
    items = make_items(3)
    slots = torch.from_numpy(model.table.slots("item", items.item_id))
    assert len(slots.unique()) == 3
    for slot, shown, rate in zip(slots, (1000, 1000, 0), (0.9, 0.1, 0.0), strict=True):
        positive = torch.zeros(shown, 1)
        positive[: int(shown * rate)] = 1.0
        model.stats.update(slot.repeat(shown), positive)
    popularity = model.popularity(items)
    assert popularity.dtype == np.float32
    assert popularity[0] > popularity[1] > popularity[2] == 0.0


def test_the_supervised_loss_is_a_sum_over_observed_labels() -> None:
    model = ranker(tasks=("like", "watch_time", "click"))
    labels = np.full((3, len(TASKS)), np.nan, np.float32)
    labels[0, TASKS.index("like")] = 1.0
    labels[1, TASKS.index("click")] = 0.0
    labels[1, TASKS.index("watch_time")] = 9.0
    labels[2, TASKS.index("follow")] = 1.0  # not a task of this model
    logits = torch.tensor([[0.3, 5.0, 5.0], [5.0, 1.5, -0.7], [5.0, 5.0, 5.0]])
    expected = (
        math.log(1 + math.exp(-0.3)) + (1.5 - math.log(10.0)) ** 2 + math.log(1 + math.exp(-0.7))
    )
    loss = model.supervised_loss(logits, model.targets(labels))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert model.num_labels(labels) == 3


def test_outputs_are_probabilities_and_seconds() -> None:
    model = ranker(tasks=("like", "watch_time"))
    logits = torch.tensor([[0.0, math.log1p(30.0)], [-2.0, -1.0], [80.0, 80.0]])
    result = model.probabilities(logits)
    np.testing.assert_allclose(result[0], [0.5, 30.0], rtol=1e-5)
    assert result[1, 1] == 0.0
    assert np.isfinite(result).all()
    assert ((result[:, 0] >= 0) & (result[:, 0] <= 1)).all()


def test_targets_of_watch_time_are_logarithms_of_seconds() -> None:
    model = ranker(tasks=("watch_time", "like"))
    labels = np.full((3, len(TASKS)), np.nan, np.float32)
    labels[0, [TASKS.index("watch_time"), TASKS.index("like")]] = [math.e - 1, 1.0]
    labels[1, TASKS.index("watch_time")] = -3.0
    targets = model.targets(labels)
    assert targets.dtype == torch.float32
    np.testing.assert_allclose(
        targets.numpy(), [[1.0, 1.0], [0.0, np.nan], [np.nan, np.nan]], rtol=1e-6
    )


def test_an_untrained_model_predicts_the_mean_of_the_item() -> None:
    """The wide input: without anything learned, scores rank items by their mean label."""
    model = ranker(tasks=("like",))
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.zero_()
        model.net.prior_scale.fill_(1.0)  # type: ignore[union-attr, operator]
    items = make_items(3)
    slots = torch.from_numpy(model.table.slots("item", items.item_id))
    model.stats.update(slots.repeat(40), torch.tensor([1.0, 0.0, 1.0]).repeat(40)[:, None])
    scores = model.score(rows_of_user(model.config.namespace, 1, 4), 1, items, 1_700_000_000_000)
    np.testing.assert_allclose(scores, model.stats.means(slots).numpy(), rtol=1e-4)
