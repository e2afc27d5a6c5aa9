"""The loss of a user's order against plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sample_events import fetch_for, make_events, small_model

from marm.config import ModelConfig
from marm.events import TASKS
from marm.memory import InProcessMemory
from marm.pairwise import pairs_within_users
from marm.ranker import Ranker


def loop_loss(users: np.ndarray, labels: np.ndarray, logits: np.ndarray) -> float:
    """Every event that has opponents averages over them; a pair's two averages count half each."""
    loss = 0.0
    for i in range(len(users)):
        against = [
            logits[i] - logits[j] if labels[i] > labels[j] else logits[j] - logits[i]
            for j in range(len(users))
            if users[j] == users[i] and {labels[i], labels[j]} == {0.0, 1.0}
        ]
        if against:
            loss += 0.5 * sum(math.log1p(math.exp(-ahead)) for ahead in against) / len(against)
    return loss


@pytest.mark.parametrize("num_users", [1, 3, 40])
def test_it_equals_a_loop_over_pairs(num_users: int) -> None:
    rng = np.random.default_rng(num_users)
    users = rng.integers(0, num_users, 60)
    labels = rng.choice([0.0, 1.0, np.nan], 60, p=[0.5, 0.4, 0.1]).astype(np.float32)
    logits = rng.normal(size=60).astype(np.float32)
    found = pairs_within_users(users, labels).loss(torch.from_numpy(logits)[:, None])
    assert float(found) == pytest.approx(loop_loss(users, labels, logits), rel=1e-5)


@pytest.mark.parametrize(
    "labels", [[], [1.0], [1.0, 1.0], [0.0, 0.0], [np.nan, 1.0], [np.nan, np.nan]]
)
def test_events_without_an_opponent_cost_nothing(labels: list[float]) -> None:
    users = np.zeros(len(labels), np.int64)
    pairs = pairs_within_users(users, np.array(labels, np.float32))
    logits = torch.ones(len(labels), 1, requires_grad=True)
    pairs.loss(logits).backward()
    assert len(pairs.weight_P) == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_events_of_two_users_are_no_pair() -> None:
    pairs = pairs_within_users(np.array([0, 1]), np.array([1.0, 0.0], np.float32))
    assert len(pairs.weight_P) == 0


def test_a_user_weighs_half_of_his_events_that_have_opponents() -> None:
    users = np.array([0] * 10 + [1] * 2 + [2] * 5)
    labels = np.array([1.0] * 9 + [0.0] + [0.0, 1.0] + [1.0] * 5, np.float32)
    pairs = pairs_within_users(users, labels)
    weight = np.bincount(users[pairs.positive_P], pairs.weight_P, minlength=3)
    np.testing.assert_allclose(weight, [5.0, 1.0, 0.0], rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"error_layers": 2}])
def test_a_model_adds_it_for_every_binary_task_and_prediction(settings: dict[str, int]) -> None:
    model = small_model("ranking", **settings)
    assert isinstance(model, Ranker)
    events = make_events(40)
    rows = fetch_for(events, InProcessMemory(model.config.namespace), 10)
    inputs = model.inputs.for_training(events, rows)

    def loss(weight: float) -> float:
        model.config = replace(model.config, pairwise_weight=weight)
        output = model.training_forward(model.net, model.embed(inputs), events.labels)
        return float(output.loss_sum.detach())

    with torch.no_grad():
        known = model.net(model.embed(inputs), model.item_prior(model.item_slots(inputs)))
    expected = 0.0
    for logits in (known.logits_BT, *known.corrected_BET.unbind(dim=1)):
        for at, task in enumerate(model.tasks):
            if task == "watch_time":
                continue
            labels = events.labels[:, TASKS.index(task)]
            expected += loop_loss(events.user_id, labels, logits[:, at].numpy())
    assert expected > 0
    assert loss(2.0) - loss(0.0) == pytest.approx(2 * expected, rel=1e-3)


def test_every_event_of_one_user_learns_his_order_whatever_the_order_of_the_batch() -> None:
    users, labels = np.array([4, 9, 4, 9, 4]), np.array([0, 1, 1, 0, 1], np.float32)
    shuffle = np.array([3, 0, 4, 2, 1])
    logits = torch.tensor([[0.3], [-1.0], [2.0], [0.5], [0.0]])
    straight = pairs_within_users(users, labels).loss(logits)
    mixed = pairs_within_users(users[shuffle], labels[shuffle]).loss(logits[shuffle])
    torch.testing.assert_close(straight, mixed)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), "1"])
def test_a_weight_that_is_none_is_refused(weight: object) -> None:
    with pytest.raises(ValueError, match="pairwise_weight must be a number of at least 0"):
        ModelConfig(pairwise_weight=weight)  # type: ignore[arg-type]
