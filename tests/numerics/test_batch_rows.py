"""A batch's own events laid out by user give what the whole block gives, and gradients do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from marm.attention import MultiLayerTargetAttention
from marm.batch_rows import BlockByUser, KeySource, WholeBlock, batch_rows
from marm.config import InterestConfig, ModelConfig
from marm.interest.interface import History
from marm.interest.stca import StackedTargetAttention
from marm.memory import Namespace
from marm.search import AllRows, RowSearch, TopRows
from marm.sequence import NUM_DISTANCE_BUCKETS, NUM_GAP_BUCKETS

DEPTH, DIM, WIDTH, NUM_ROWS = 2, 8, 6, 5

# Of one row, what is found is copied; of three, what is not found is hidden.
SEARCHES = [AllRows(), TopRows(1), TopRows(3)]
BY_USER = {
    "unsorted_users_of_one_to_three_events": [3, 0, 2, 1, 0, 4, 0, 2, 5],
    "one_event_each": [2, 0, 1, 3],
    "first_user_has_not_the_most": [0, 1, 0, 1, 1, 2, 0, 1],
    "half_a_batch_of_one_user": [1, 0, 0, 0, 2, 3],
}
LAYOUTS = {
    "no_event": ([], WholeBlock),
    "one_event": ([0], WholeBlock),
    "one_user": ([0] * 40, WholeBlock),
    "four_users": ([0, 1, 2, 3] * 10, WholeBlock),
    "one_user_has_half": ([0] * 20 + list(range(1, 20)), WholeBlock),
    "one_user_has_a_twelfth": ([0] * 9 + list(range(1, 100)), BlockByUser),
    "twenty_users": (list(range(20)) * 2, BlockByUser),
    "an_event_each": (list(range(10)), BlockByUser),
}


class Batch:
    """Events of users; each sees some of its user's earlier ones, and stored rows."""

    def __init__(self, user_row: list[int]) -> None:
        generator = torch.Generator().manual_seed(len(user_row))
        events, users = len(user_row), max(user_row, default=0) + 1
        self.user_row_B = torch.tensor(user_row, dtype=torch.int64)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

        def source(keys: int, features: Tensor, visible: Tensor, of: Tensor | None) -> KeySource:
            distance = torch.randint(NUM_DISTANCE_BUCKETS, (events, keys), generator=generator)
            gap = torch.randint(NUM_GAP_BUCKETS, (events, keys), generator=generator)
            return KeySource(features, visible, distance, gap, of)

        some = torch.rand((events, events), generator=generator) < 0.8
        earlier = torch.ones(events, events).tril(-1).bool()
        same = self.user_row_B[:, None] == self.user_row_B[None, :]
        self.block = source(events, normal(events, WIDTH), earlier & same & some, None)
        seen = torch.rand((events, NUM_ROWS), generator=generator) < 0.7
        self.slab = source(NUM_ROWS, normal(users, NUM_ROWS, WIDTH), seen, self.user_row_B)
        self.memory_UNLD = normal(users, NUM_ROWS, DEPTH, DIM).detach()
        self.queries = normal(events, WIDTH)
        self.cached_BLD = normal(events, DEPTH, DIM)
        self.leaves = [self.queries, self.block.features, self.slab.features]


def whole(block: KeySource, user_row_B: Tensor) -> WholeBlock:
    return WholeBlock(block)


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    loss = sum(((1 + place) * y.sin().sum() for place, y in enumerate(outputs)), torch.zeros(()))
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


def random_attention(search: RowSearch) -> MultiLayerTargetAttention:
    torch.manual_seed(1)
    network = MultiLayerTargetAttention(
        WIDTH, WIDTH, DIM, DIM, DEPTH, 2, ("distance", "gap"), search
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network.double()


@pytest.mark.parametrize("search", SEARCHES, ids=repr)
@pytest.mark.parametrize("writer", [True, False], ids=["writes", "reads"])
@pytest.mark.parametrize("users", BY_USER)
def test_layers_over_rows_by_user_equal_those_over_the_whole_block(
    users: str, writer: bool, search: RowSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, network = Batch(BY_USER[users]), random_attention(search)
    cached = None if writer else batch.cached_BLD
    leaves = [*batch.leaves, *network.parameters(), *([] if writer else [batch.cached_BLD])]

    def numbers() -> tuple[list[Tensor], list[Tensor]]:
        outputs = network(
            batch.queries, batch.slab, batch.memory_UNLD, batch.slab.visible, batch.block, cached
        )
        return outputs, gradients(outputs, leaves)

    monkeypatch.setattr("marm.attention.batch_rows", BlockByUser.of)
    laid_out = numbers()
    monkeypatch.setattr("marm.attention.batch_rows", whole)
    torch.testing.assert_close(laid_out, numbers(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("users", BY_USER)
def test_stacked_attention_over_rows_by_user_equals_that_over_the_whole_block(
    users: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch(BY_USER[users])
    torch.manual_seed(2)
    config = ModelConfig(
        namespace=Namespace(depth=0, dim=DIM, dtype="float32"),
        depth=0,
        attention_dim=DIM,
        feature_dim=WIDTH,
    )
    method = StackedTargetAttention(config, InterestConfig(method="stca", layers=1)).double()
    history = History(batch.slab, batch.memory_UNLD, batch.slab.visible, batch.block)
    leaves = [*batch.leaves, *method.parameters()]

    def numbers() -> tuple[Tensor, list[Tensor]]:
        known = method(batch.queries, history).interest_BD
        return known, gradients([known], leaves)

    monkeypatch.setattr("marm.interest.stca.batch_rows", BlockByUser.of)
    laid_out = numbers()
    monkeypatch.setattr("marm.interest.stca.batch_rows", whole)
    torch.testing.assert_close(laid_out, numbers(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("users", LAYOUTS)
def test_the_layout_that_attends_to_less(users: str) -> None:
    user_row, layout = LAYOUTS[users]
    batch = Batch(user_row)
    assert isinstance(batch_rows(batch.block, batch.user_row_B), layout)


def test_every_event_lies_with_its_user_in_the_order_of_the_batch() -> None:
    batch = Batch([1, 0, 1, 2, 0, 1])
    rows = BlockByUser.of(batch.block, batch.user_row_B)
    number_P1 = torch.arange(1.0, 7.0)[:, None]
    assert rows.rows(number_P1)[:, :, 0].tolist() == [[2, 5, 0], [1, 3, 6], [4, 0, 0]]
