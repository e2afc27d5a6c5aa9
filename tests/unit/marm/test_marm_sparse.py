"""The hashed table against a dense one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sample_events import INT64

from marm.addressing import feature_slots
from marm.network import embed_items
from marm.sparse import FEATURE_SALTS, HashedTable


@pytest.fixture
def table() -> HashedTable:
    torch.manual_seed(3)
    return HashedTable(64, 5)


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_salts_are_part_of_the_format() -> None:
    assert FEATURE_SALTS == {
        "item": 1,
        "author": 2,
        "tag": 3,
        "duration": 4,
        "user": 5,
        "context": 6,
    }


def test_slots_keep_the_shape_and_take_any_integer(table: HashedTable) -> None:
    ids = np.array([[0, -1, INT64.min], [5, 7, INT64.max]])
    slots = table.slots("tag", ids)
    assert slots.shape == ids.shape
    np.testing.assert_array_equal(slots.ravel(), feature_slots(3, ids.ravel(), 64))
    assert ((slots >= 0) & (slots < 64)).all()


def test_equal_ids_of_different_features_have_different_rows() -> None:
    table = HashedTable(1 << 20, 1)
    ids = np.arange(50)
    shared = np.intersect1d(table.slots("item", ids), table.slots("user", ids))
    assert len(shared) == 0


def test_rows_are_distinct_and_give_back_the_table(table: HashedTable) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 64, shape) for shape in ((40,), (3, 7), (0, 4), (2, 1, 5))]
    rows, positions = table.rows_of(*arrays)
    slots = rows.slots.numpy()
    assert len(np.unique(slots)) == len(slots)
    assert set(slots.tolist()) == {int(slot) for array in arrays for slot in array.ravel()}
    for array, position in zip(arrays, positions, strict=True):
        assert position.shape == array.shape
        assert torch.equal(rows.gather(position), table.weight[torch.from_numpy(array)])


def test_no_slots(table: HashedTable) -> None:
    rows, (position,) = table.rows_of(np.empty((0, 3), np.int64))
    assert len(rows.slots) == 0
    assert rows.gather(position).shape == (0, 3, 5)


def test_threads_do_not_mix_up_their_rows(eager_switching: None) -> None:
    table = HashedTable(4096, 4)

    def mistakes(seed: int) -> int:
        rng = np.random.default_rng(seed)
        found = 0
        for _ in range(60):
            slots = rng.integers(0, 4096, 6000)
            rows, (position,) = table.rows_of(slots)
            found += not torch.equal(rows.gather(position), table.weight[torch.from_numpy(slots)])
        return found

    with ThreadPoolExecutor(4) as executor:
        assert list(executor.map(mistakes, range(4))) == [0, 0, 0, 0]


def test_the_gradient_is_that_of_a_dense_embedding(table: HashedTable) -> None:
    slots = np.array([[3, 3, 9], [9, 60, 3]])
    weights = torch.randn(2, 3, 5)
    rows, (position,) = table.rows_of(slots)
    (rows.gather(position) * weights).sum().backward()
    dense = torch.nn.Embedding.from_pretrained(table.weight.clone(), freeze=False)
    (dense(torch.from_numpy(slots)) * weights).sum().backward()
    assert rows.values.grad is not None
    assert dense.weight.grad is not None
    torch.testing.assert_close(rows.values.grad, dense.weight.grad[rows.slots])


def test_an_items_embedding_is_the_sum_of_its_features(table: HashedTable) -> None:
    slots = np.array([[1, 2, 3], [1, 1, 63]])
    expected = table.weight[torch.from_numpy(slots)].sum(dim=1)
    torch.testing.assert_close(embed_items(table, slots), expected)
    assert embed_items(table, np.empty((0, 3), np.int64)).shape == (0, 5)


def test_updates_equal_row_wise_adagrad_on_a_dense_table(table: HashedTable) -> None:
    rate, epsilon = 0.2, 1e-8
    weight, accumulated = table.weight.numpy().copy(), np.zeros(64, np.float32)
    rng = np.random.default_rng(1)
    for _ in range(4):
        slots = rng.choice(64, 10, replace=False)
        gradient = rng.normal(size=(10, 5)).astype(np.float32)
        table.apply_gradient(torch.from_numpy(slots), torch.from_numpy(gradient), rate, epsilon)
        for slot, row in zip(slots, gradient, strict=True):
            accumulated[slot] += np.mean(row**2)
            weight[slot] -= rate * row / (np.sqrt(accumulated[slot]) + epsilon)
    np.testing.assert_allclose(table.weight.numpy(), weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table.squared_gradient.numpy(), accumulated, rtol=1e-5)


def test_rows_that_were_not_touched_stay_bit_for_bit(table: HashedTable) -> None:
    before = table.weight.clone()
    touched = torch.tensor([5, 7])
    table.apply_gradient(touched, torch.ones(2, 5), 0.1)
    changed = (table.weight != before).any(dim=1)
    assert torch.nonzero(changed).flatten().tolist() == [5, 7]
    assert torch.nonzero(table.squared_gradient).flatten().tolist() == [5, 7]


def test_a_zero_gradient_changes_nothing(table: HashedTable) -> None:
    before = table.weight.clone()
    table.apply_gradient(torch.tensor([5]), torch.zeros(1, 5), 0.1)
    assert torch.equal(table.weight, before)


def test_inference_collects_no_gradient(table: HashedTable) -> None:
    with torch.inference_mode():
        assert not table.rows_of(np.array([1]))[0].values.requires_grad
    with torch.no_grad():
        assert not table.rows_of(np.array([1]))[0].values.requires_grad
    assert table.rows_of(np.array([1]))[0].values.requires_grad


def test_the_optimiser_state_is_not_published(table: HashedTable) -> None:
    assert set(table.state_dict()) == {"weight"}
