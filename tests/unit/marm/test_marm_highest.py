"""The highest scores: the kernel against torch's operators and a sort."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from marm.highest import highest, highest_grouped

WAYS = [highest, highest_grouped]


def scores_found(way: Callable[[Tensor, int], Tensor], scores: Tensor, k: int) -> Tensor:
    """The scores at the positions found, lowest first; no position may come twice."""
    position = way(scores, k)
    assert position.shape == (len(scores), k)
    assert all(len(set(row)) == k for row in position.tolist())
    return scores.gather(1, position).sort(dim=1).values


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("num_rows", "k"),
    [(1, 1), (10, 3), (16, 16), (17, 1), (31, 30), (1000, 7), (1603, 100), (900, 899)],
)
def test_the_highest_are_those_of_a_sort(
    num_rows: int, k: int, way: Callable[[Tensor, int], Tensor]
) -> None:
    scores = torch.randn(19, num_rows)
    expected = scores.sort(dim=1).values[:, -k:]
    torch.testing.assert_close(scores_found(way, scores, k), expected, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "values",
    [
        [0.0],
        [-1.0, 0.0, -0.0, 1.0],
        [float("-inf"), 3.0],
        [float("inf"), float("-inf")],
        [1.0, 1.0000001],
        [-3e38, 3e38, 1e-45],
    ],
)
def test_ties_and_extremes(values: list[float], way: Callable[[Tensor, int], Tensor]) -> None:
    scores = torch.tensor(values)[torch.randint(0, len(values), (9, 100))]
    for k in (1, 13, 50, 100):
        expected = scores.sort(dim=1).values[:, -k:]
        torch.testing.assert_close(scores_found(way, scores, k), expected, rtol=0, atol=0)


@pytest.mark.parametrize("num_rows", [3, 40])
@pytest.mark.parametrize("more", [1, 5])
def test_more_than_there_are_is_refused(num_rows: int, more: int) -> None:
    with pytest.raises(ValueError, match=f"no {num_rows + more} highest of {num_rows}"):
        highest(torch.randn(2, num_rows), num_rows + more)
    with pytest.raises(ValueError, match=f"no -1 highest of {num_rows}"):
        highest(torch.randn(2, num_rows), -1)


@pytest.mark.parametrize("num_rows", [0, 3, 40])
def test_none_may_be_asked_for(num_rows: int) -> None:
    assert highest(torch.randn(2, num_rows), 0).shape == (2, 0)


def test_positions_are_where_the_scores_are() -> None:
    with torch.device("meta"):
        elsewhere = torch.zeros(2, 40)
        position = highest(torch.randn(2, 40, device="cpu"), 3)
    assert position.device == torch.device("cpu")
    assert highest(elsewhere, 3).is_meta


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_is_found_first(sign: float) -> None:
    scores = torch.randn(3, 200)
    scores[1, 77] = sign * float("nan")
    scores[2] = float("nan")
    position = highest(scores, 5)
    assert 77 in position[1].tolist()
    assert len(set(position[2].tolist())) == 5
    assert highest(scores[:0], 5).shape == (0, 5)
