"""DIN against its activation unit applied to one row after the other."""

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

from marm.interest.din import Din


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("n", [4, 20])
def test_rows_are_summed_by_their_activation(situation: str, n: int) -> None:
    method = random_method(n, n, method="din")
    assert isinstance(method, Din)
    history = random_history(situation, seed=5)

    def reference(number: int, query_F: Tensor) -> Tensor:
        q = method.query_norm(query_F)
        pooled = torch.zeros(method.recency.num_heads, 6, dtype=torch.float64)
        for row in seen_rows(history, number, n):
            k = method.row_norm(row.features)
            hidden = method.hidden(torch.cat([k, q, k - q, k * q]))
            activation = method.weight(hidden * torch.sigmoid(hidden))
            weight_H = activation * bias_of(method.recency, row).exp()
            pooled += weight_H[:, None] * k / n**0.5
        return read_out(method.readout, query_F, pooled.flatten())

    assert_equals_reference(method, situation, 5, reference)
