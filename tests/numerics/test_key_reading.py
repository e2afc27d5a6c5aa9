"""Keys read with the projection in the queries give what projected keys give, and gradients do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from marm.key_reading import AbsorbedKeys, KeyReading, ProjectedKeys, RowPart, read_keys
from marm.query_groups import QueryGroups

NUM_HEADS, HEAD_WIDTH, NUM_ROWS = 2, 4, 7
WIDTHS = (6, 5, 1)

USER_ROWS = {
    "one_query_each_unsorted": [3, 0, 2, 1],
    "some_with_none": [4, 1, 4, 4, 1],
    "one_user_has_most": [0] * 40 + [1, 2, 3, 4, 5, 6, 7, 8, 9] * 2,
    "nobody_asks": [],
}


class Case:
    """Queries of users, and their rows in three parts: two normalised, the first without gradient
    as cached vectors are."""

    def __init__(self, user_row: list[int]) -> None:
        torch.manual_seed(len(user_row))
        self.user_row_B = torch.tensor(user_row, dtype=torch.int64)
        self.num_users = max(user_row, default=2) + 1
        shape = (self.num_users, NUM_ROWS)
        cached, live, plain = (torch.randn(*shape, width, dtype=torch.float64) for width in WIDTHS)
        norms = [nn.LayerNorm(width).double() for width in WIDTHS[:2]]
        for norm in norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        self.live, self.plain = live.requires_grad_(), plain.requires_grad_()
        self._cached, self._norms = 100 * cached, norms
        self.key_value = nn.Linear(sum(WIDTHS), 2 * NUM_HEADS * HEAD_WIDTH, bias=False).double()
        self.q_BHE = torch.randn(len(user_row), NUM_HEADS, HEAD_WIDTH, dtype=torch.float64)
        self.q_BHE.requires_grad_()
        self.leaves = [
            self.q_BHE,
            self.live,
            self.plain,
            *self.key_value.parameters(),
            *(parameter for norm in norms for parameter in norm.parameters()),
        ]

    @property
    def parts(self) -> tuple[RowPart, ...]:
        return (
            RowPart.normalised(self._cached, self._norms[0]),
            RowPart.normalised(self.live, self._norms[1]),
            RowPart(self.plain),
        )

    def numbers(self, reading: KeyReading) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Products, mixed values, and what every leaf gets from a loss of both."""
        content_BHN = reading.content()
        mixed_BHE = reading.mix(torch.softmax(content_BHN, dim=-1))
        loss = mixed_BHE.square().sum() + content_BHN.sin().sum()
        return content_BHN, mixed_BHE, list(torch.autograd.grad(loss, self.leaves))


@pytest.mark.parametrize("name", USER_ROWS)
def test_absorbed_keys_equal_projected_keys(name: str) -> None:
    case = Case(USER_ROWS[name])
    groups = QueryGroups.of(case.user_row_B, case.num_users)
    plain = case.numbers(ProjectedKeys(case.q_BHE, case.parts, case.key_value, case.user_row_B))
    absorbed = case.numbers(AbsorbedKeys(case.q_BHE, case.parts, case.key_value, groups))
    torch.testing.assert_close(absorbed, plain, rtol=1e-9, atol=1e-9)


def test_a_user_with_most_queries_does_not_make_everyones_group_large() -> None:
    case = Case(USER_ROWS["one_user_has_most"])
    groups = QueryGroups.of(case.user_row_B, case.num_users)
    assert groups.user_G is None  # 58 queries in 10 groups of 40: padding is cheaper than copies
    crowded = torch.cat([torch.zeros(200, dtype=torch.int64), torch.arange(200)])
    groups = QueryGroups.of(crowded, 200)
    assert groups.user_G is not None
    assert groups.size == 4
    assert len(groups.user_G) == 199 + 51
    places = crowded.new_full((len(groups.query_P),), -1)
    places[groups.place_B] = crowded
    assert torch.equal(places[places >= 0], groups.user_G.repeat_interleave(4)[places >= 0])


def test_groups_of_a_crowded_user_give_the_same_numbers() -> None:
    case = Case([0] * 60 + list(range(1, 60)))
    groups = QueryGroups.of(case.user_row_B, case.num_users)
    assert groups.user_G is not None
    plain = case.numbers(ProjectedKeys(case.q_BHE, case.parts, case.key_value, case.user_row_B))
    absorbed = case.numbers(AbsorbedKeys(case.q_BHE, case.parts, case.key_value, groups))
    torch.testing.assert_close(absorbed, plain, rtol=1e-9, atol=1e-9)


def test_few_queries_per_user_are_absorbed_and_many_are_not() -> None:
    few, many = Case([0, 1, 2, 3]), Case([0, 1] * 40)
    for case, expected in ((few, AbsorbedKeys), (many, ProjectedKeys)):
        reading = read_keys(case.q_BHE, case.parts, case.key_value, case.user_row_B)
        assert isinstance(reading, expected)


def test_rows_that_all_queries_share_are_projected_once() -> None:
    case = Case([0, 0, 0])
    of_user = read_keys(case.q_BHE, case.parts, case.key_value, case.user_row_B)
    shared = tuple(RowPart(part.full()[0]) for part in case.parts)
    of_block = read_keys(case.q_BHE, shared, case.key_value, None)
    assert isinstance(of_user, ProjectedKeys)
    assert isinstance(of_block, ProjectedKeys)
    torch.testing.assert_close(of_user.content(), of_block.content())
    weights_BHN = torch.softmax(of_user.content(), dim=-1)
    torch.testing.assert_close(of_user.mix(weights_BHN), of_block.mix(weights_BHN))
