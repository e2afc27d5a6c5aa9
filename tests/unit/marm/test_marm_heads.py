"""The mixture of experts, task by task."""

from __future__ import annotations

import torch
from torch import nn

from marm.heads import MixtureOfExpertsHeads


def make_heads(num_tasks: int = 3, num_experts: int = 4) -> MixtureOfExpertsHeads:
    torch.manual_seed(0)
    return MixtureOfExpertsHeads(6, num_tasks, num_experts, 5)


def test_one_logit_per_task_also_for_no_inputs() -> None:
    heads = make_heads()
    assert heads(torch.randn(7, 6)).shape == (7, 3)
    assert heads(torch.empty(0, 6)).shape == (0, 3)
    assert make_heads(1, 1)(torch.randn(2, 6)).shape == (2, 1)


def test_it_is_a_gated_mixture_written_out() -> None:
    heads, inputs = make_heads(), torch.randn(4, 6)
    x = inputs
    for row in range(4):
        for task in range(3):
            gate = torch.softmax(heads.gates(x[row]).view(3, 4)[task], dim=0)
            torch.testing.assert_close(gate.sum(), torch.tensor(1.0))
            mixed = torch.zeros(5)
            for expert in range(4):
                part = slice(expert * 5, (expert + 1) * 5)
                hidden = nn.functional.linear(
                    x[row], heads.experts.weight[part], heads.experts.bias[part]
                )
                mixed = mixed + gate[expert] * nn.functional.gelu(hidden)
            expected = mixed @ heads.tower_weight[task] + heads.tower_bias[task]
            torch.testing.assert_close(heads(inputs)[row, task], expected)


def test_equal_experts_make_gates_irrelevant() -> None:
    """Gates sum to one: mixing four copies of an expert is that expert."""
    heads, inputs = make_heads(), torch.randn(5, 6)
    with torch.no_grad():
        heads.experts.weight.copy_(heads.experts.weight[:5].repeat(4, 1))
        heads.experts.bias.copy_(heads.experts.bias[:5].repeat(4))
        before = heads(inputs)
        heads.gates.weight.normal_(std=5.0)
        torch.testing.assert_close(heads(inputs), before)


def test_a_task_has_its_own_gate_and_tower() -> None:
    heads, inputs = make_heads(), torch.randn(5, 6)
    with torch.no_grad():
        before = heads(inputs)
        heads.gates.weight[4:8] += torch.randn(4, 6)  # the gate of task 1
        heads.tower_bias[2] += 1.0
        after = heads(inputs)
    torch.testing.assert_close(after[:, 0], before[:, 0], rtol=0, atol=0)
    assert not torch.allclose(after[:, 1], before[:, 1])
    torch.testing.assert_close(after[:, 2], before[:, 2] + 1.0)
