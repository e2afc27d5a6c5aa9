"""Stacked target attention against plain loops, and what sets it apart from MARM."""

from __future__ import annotations

import pytest
import torch
from deep_histories import deep_case
from interest_histories import (
    SITUATIONS,
    assert_equals_reference,
    bias_of,
    random_history,
    random_method,
    seen_rows,
)
from torch import Tensor, nn

from marm.attention import MultiLayerTargetAttention, TargetAttention
from marm.interest.stca import StackedTargetAttention
from marm.reference import _attend


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_equals_plain_loops(situation: str, layers: int) -> None:
    method = random_method(layers, 50, method="stca", layers=layers)
    assert isinstance(method, StackedTargetAttention)
    history = random_history(situation, 5)

    def stacked(number: int, query: Tensor) -> Tensor:
        rows = seen_rows(history, number, 50)
        for index, layer in enumerate([method.first, *method.layers]):
            assert isinstance(layer, TargetAttention)
            keys = [method.feature_norms[index](row.features) for row in rows]
            biases = [bias_of(method.recency, row, index) for row in rows]
            query = _attend(
                layer,
                query,
                torch.stack(keys) if keys else torch.zeros(0, 6, dtype=torch.float64),
                torch.stack(biases, dim=1) if biases else torch.zeros(2, 0, dtype=torch.float64),
            )
        return query

    assert_equals_reference(method, situation, 5, stacked)


def test_marm_whose_layers_ignore_their_cached_vectors_is_the_stack() -> None:
    """Keys are all that differs: with no weight on cached vectors, MARM computes the same."""
    case = deep_case("training", 40, method="stca", layers=2)
    stack, history = case.method, case.history
    assert isinstance(stack, StackedTargetAttention)
    marm = MultiLayerTargetAttention(6, 6, 8, 8, 2, 2, ("distance", "gap"))
    for name in ("recency", "first", "feature_norms"):
        getattr(marm, name).load_state_dict(getattr(stack, name).state_dict())
    for own, raw in zip(marm.layers, stack.layers, strict=True):
        weights = raw.state_dict()
        narrow = weights["key_value.weight"]
        weights["key_value.weight"] = nn.functional.pad(narrow, (8, 0))
        own.load_state_dict(weights)
    memory = torch.randn(*history.slab.features.shape[:2], 2, 8)
    with torch.no_grad():
        expected = stack(case.query_BF, history).interest_BD
        outputs = marm(
            case.query_BF, history.slab, memory, history.slab.visible, history.block, None
        )
    torch.testing.assert_close(outputs[-1], expected, rtol=1e-5, atol=1e-5)
