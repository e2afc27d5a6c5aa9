"""Sum pooling against a mean computed row by row."""

from __future__ import annotations

import pytest
import torch
from interest_histories import (
    SITUATIONS,
    assert_equals_reference,
    bias_of,
    random_history,
    random_method,
    read_out,
    seen_rows,
)
from torch import Tensor

from marm.interest.sum_pooling import SumPooling


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("n", [4, 20])
def test_the_mean_is_weighted_by_recency(situation: str, n: int) -> None:
    method = random_method(n, n, method="sum_pooling")
    assert isinstance(method, SumPooling)
    history = random_history(situation, seed=3)

    def reference(number: int, query_F: Tensor) -> Tensor:
        rows = seen_rows(history, number, n)
        pooled = torch.zeros(method.recency.num_heads, 6, dtype=torch.float64)
        for head in range(method.recency.num_heads):
            weights = [bias_of(method.recency, row)[head].exp() for row in rows]
            for row, weight in zip(rows, weights, strict=True):
                pooled[head] += weight / sum(weights) * method.row_norm(row.features)
        return read_out(method.readout, query_F, pooled.flatten())

    assert_equals_reference(method, situation, 3, reference)


def test_without_recency_it_is_the_plain_mean() -> None:
    method = random_method(0, 20, method="sum_pooling")
    assert isinstance(method, SumPooling)
    with torch.no_grad():
        method.recency.distance.zero_()
        method.recency.gap.zero_()
    history = random_history("training", seed=4)

    def reference(number: int, query_F: Tensor) -> Tensor:
        keys = [method.row_norm(row.features) for row in seen_rows(history, number, 20)]
        mean = torch.stack(keys).mean(dim=0) if keys else torch.zeros(6, dtype=torch.float64)
        return read_out(method.readout, query_F, mean.repeat(2))

    assert_equals_reference(method, "training", 4, reference)
