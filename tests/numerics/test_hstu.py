"""HSTU against plain loops; targets that share the rows' states against one target at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from deep_histories import (
    SITUATIONS,
    DeepCase,
    PlainMethod,
    Seen,
    assert_same_gradients,
    deep_case,
    seen_bias,
)
from torch import Tensor

from marm.config import InterestConfig, ModelConfig
from marm.events import EventBatch
from marm.interest.hstu import Hstu, HstuBlock
from marm.interest.methods import build_interest
from marm.memory import Namespace
from marm.reference import _live_features


def plain_block(
    block: HstuBlock, x: Tensor, past: list[Tensor], bias_HN: Tensor, history_length: int
) -> Tensor:
    """One token over its past and itself, head by head."""
    silu = torch.nn.functional.silu
    heads = block.num_heads

    def split(token: Tensor) -> tuple[Tensor, ...]:
        normal = block.norm(token)
        u, q = silu(block.gate_query(normal)).chunk(2)
        k, v = silu(block.key_value(normal)).chunk(2)
        return u, q.view(heads, -1), k.view(heads, -1), v.view(heads, -1)

    u, q, k, v = split(x)
    keys = [*(split(token)[2:] for token in past), (k, v)]
    biases = torch.cat([bias_HN, block.self_bias[:, None]], dim=1)
    mixed = []
    for head in range(heads):
        total = torch.zeros_like(v[head])
        for column, (key, value) in enumerate(keys):
            logit = q[head] @ key[head] / len(q[head]) ** 0.5 + biases[head, column]
            total = total + silu(logit) / history_length * value[head]
        mixed.append(total)
    return x + block.output(block.mixed_norm(torch.cat(mixed)) * u)


class PlainHstu(PlainMethod):
    """A row's token is its live embedding."""

    def __init__(self, case: DeepCase, rows: EventBatch) -> None:
        assert isinstance(case.method, Hstu)
        self.method, self.history_length = case.method, case.n
        self.num_layers = len(self.method.blocks)
        live = _live_features(case.model, case.model.net, rows)
        self.row_inputs = [list(self.method.token(live))]

    def token(self, query: Tensor) -> Tensor:
        return self.method.token(query)

    def output(self, layer: int, x: Tensor, seen: list[Seen]) -> Tensor:
        block = self.method.blocks[layer]
        assert isinstance(block, HstuBlock)
        past = [self.row_inputs[layer][one.row] for one in seen]
        bias_HN = seen_bias(self.method.recency, layer, seen)
        return plain_block(block, x, past, bias_HN, self.history_length)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("n", [3, 40])
@pytest.mark.parametrize("layers", [1, 3])
def test_equals_plain_loops(situation: str, n: int, layers: int) -> None:
    case = deep_case(situation, n, method="hstu", layers=layers)
    actual = case.method(case.query_BF, case.history).interest_BD
    expected = case.reference(lambda rows: PlainHstu(case, rows))
    assert_same_gradients(case, actual, expected)


def test_many_targets_equal_one_at_a_time() -> None:
    """M-FALCON: targets share the states of the rows and never see each other."""
    case = deep_case("request", 40, method="hstu", layers=2)
    with torch.no_grad():
        together = case.method(case.query_BF, case.history).interest_BD
        alone = torch.cat(
            [case.method(query[None], case.history).interest_BD for query in case.query_BF]
        )
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_the_target_does_not_see_the_feedback_of_its_own_event() -> None:
    case = deep_case("training", 40, method="hstu", layers=2)
    block = case.history.block
    assert block is not None
    with torch.no_grad():
        before = case.method(case.query_BF, case.history).interest_BD
        changed = block.features.clone()
        changed[31] += 1.0  # the newest event of all: no other query sees it
        after = case.method(
            case.query_BF, replace(case.history, block=replace(block, features=changed))
        ).interest_BD
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_no_blocks_are_refused() -> None:
    config = ModelConfig(namespace=Namespace(depth=0), depth=0)
    with pytest.raises(ValueError, match="hstu needs at least one block, got layers=0; raise it"):
        build_interest(config, InterestConfig(method="hstu", layers=0))
