"""Several vectors per user: what one is like, and what several learn that one can't."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sample_events import (
    NOW_MS,
    fetch_for,
    make_events,
    rows_of_user,
    small_model,
)

from marm.events import TASKS
from marm.memory import InProcessMemory
from marm.retriever import TEMPERATURE, Retriever, RetrieverNet, best_of_vectors
from marm.sequence import raw_rows


def retriever(num_user_vectors: int, **settings: object) -> Retriever:
    torch.manual_seed(0)
    model = small_model("retrieval", num_user_vectors=num_user_vectors, **settings)
    assert isinstance(model, Retriever)
    return model


def training_inputs(model: Retriever):
    events = make_events(60)
    first, batch = events.take(slice(0, 20)), events.take(slice(20, 60))
    memory = InProcessMemory(model.config.namespace)
    rows = raw_rows(first, model.config.namespace.row_dtype)
    rows["written_step"] = 1
    rows["memory"] = np.random.default_rng(0).normal(size=rows["memory"].shape)
    memory.save(first.user_id, rows)
    stored = fetch_for(batch, memory, model.config.history_length)
    return batch, model.inputs.for_training(batch, stored)


def block_memory(model: Retriever, num_events: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(num_events, model.config.namespace.depth, model.config.namespace.dim)


@pytest.mark.parametrize("num_user_vectors", [1, 3])
def test_the_vectors_of_a_user_are_unit_vectors(num_user_vectors: int) -> None:
    model = retriever(num_user_vectors)
    rows = rows_of_user(model.config.namespace, 3, 6)
    vectors = model.user_vectors(rows, 3, NOW_MS, 1)
    assert vectors.shape == (num_user_vectors, model.config.output_dim)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    assert len(np.unique(vectors.round(6), axis=0)) == num_user_vectors
    with pytest.raises(ValueError, match="rows of user 4 alone"):
        model.user_vectors(rows, 4, NOW_MS, 1)


def test_one_vector_is_as_it_was() -> None:
    model = retriever(1)
    rows = rows_of_user(model.config.namespace, 3, 6)
    np.testing.assert_array_equal(
        model.user_vector(rows, 3, NOW_MS), model.user_vectors(rows, 3, NOW_MS)[0]
    )
    assert not any("interest" in name for name in model.state_dict())
    several = retriever(2)
    with pytest.raises(ValueError, match="one vector per user, got 2; use user_vectors"):
        several.user_vector(rows, 3, NOW_MS)


def test_without_interests_all_vectors_are_the_one() -> None:
    """An interest of zero asks what a model of one vector asks."""
    several, one = retriever(3), retriever(1)
    weights = several.state_dict()
    one.load_state_dict({name: weights[name] for name in one.state_dict()})
    with torch.no_grad():
        several.net.interests.zero_()  # type: ignore[union-attr, operator]
    rows = rows_of_user(one.config.namespace, 3, 6)
    expected = one.user_vectors(rows, 3, NOW_MS)
    for vector in several.user_vectors(rows, 3, NOW_MS):
        np.testing.assert_allclose(vector, expected[0], atol=1e-6)
    batch, inputs = training_inputs(one)
    memory = block_memory(one, len(batch))
    losses = [
        model.training_forward(model.net, model.embed(inputs), batch.labels, memory).loss_sum
        for model in (one, several)
    ]
    torch.testing.assert_close(losses[0], losses[1])


def test_a_request_passes_all_interests_at_once() -> None:
    model = retriever(3)
    rows = rows_of_user(model.config.namespace, 3, 6)
    net = model.net
    assert isinstance(net, RetrieverNet)
    embedded = model.embed(model._user_inputs(rows, NOW_MS, 1))
    with torch.no_grad():
        query = embedded.user_BF + embedded.context_BF
        outputs, _ = net._attend_by_interest(query, embedded, None)
        one_by_one = torch.nn.functional.normalize(net.user_tower(outputs), dim=-1)
    np.testing.assert_allclose(
        model.user_vectors(rows, 3, NOW_MS, 1), one_by_one.numpy(), atol=1e-6
    )


def test_the_loss_takes_the_best_vector_of_every_item() -> None:
    model = retriever(3)
    batch, inputs = training_inputs(model)
    memory = block_memory(model, len(batch))
    output = model.training_forward(model.net, model.embed(inputs), batch.labels, memory)
    with torch.no_grad():
        vectors = model.net(model.embed(inputs), memory)[:2]
        users, items = (part.double().numpy() for part in vectors)
    slots = inputs.target_slots_BK[:, 0]
    log_q = np.log(1 / len(model.stats.exposures))  # nothing was counted yet
    loss = 0.0
    for i in np.flatnonzero(batch.labels[:, TASKS.index("long_view")] > 0):
        own = users[3 * i : 3 * i + 3]
        logits = {
            j: max(vector @ items[j] for vector in own) / TEMPERATURE - log_q
            for j in range(len(batch))
            if j == i or slots[j] != slots[i]
        }
        loss += np.log(sum(np.exp(value) for value in logits.values())) - logits[i]
    assert float(output.loss_sum.detach()) == pytest.approx(loss, rel=1e-4)
    assert output.scores_BT.shape == (len(batch), 1)


def test_every_parameter_learns() -> None:
    model = retriever(3)
    batch, inputs = training_inputs(model)
    memory = block_memory(model, len(batch))
    output = model.training_forward(model.net, model.embed(inputs), batch.labels, memory)
    output.loss_sum.backward()
    dead = [
        name
        for name, parameter in model.net.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert dead == []
    assert model.net.interests.grad.any(dim=1).all()  # type: ignore[union-attr, operator]


def test_only_the_nearest_vector_learns_from_an_item() -> None:
    scores = torch.tensor([[[0.1, 0.9], [0.5, 0.2]]], requires_grad=True)
    best = best_of_vectors(scores)
    assert best.tolist() == [[0.5, pytest.approx(0.9)]]
    best.sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[[0.0, 1.0], [1.0, 0.0]]]


def fitted_loss(num_user_vectors: int) -> float:
    """Nats per positive of users who each like two of four items at the compass points."""
    items = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    pairs = torch.tensor([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
    torch.manual_seed(0)
    users = torch.randn(len(pairs), num_user_vectors, 2).requires_grad_()
    optimizer = torch.optim.Adam([users], lr=0.1)
    for _ in range(100):
        unit = torch.nn.functional.normalize(users, dim=-1)
        logits = best_of_vectors(unit @ items.T) / TEMPERATURE
        loss = -torch.log_softmax(logits, dim=1).gather(1, pairs).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_several_vectors_learn_tastes_that_one_cannot_hold() -> None:
    """No single vector is near two items that lie opposite each other."""
    assert fitted_loss(2) == pytest.approx(np.log(2), abs=0.01)  # nothing but the liked two
    assert fitted_loss(1) > np.log(2) + 0.5
